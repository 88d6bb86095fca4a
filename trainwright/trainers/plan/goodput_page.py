"""goodput_plan.html: one self-contained page that shows a plan's inputs, calculation and result."""

import math
from collections.abc import Sequence
from html import escape

import numpy as np

from trainwright.trainers.observers.page_style import STYLE
from trainwright.trainers.observers.plot import Curve, Mark, Plot, draw
from trainwright.trainers.plan.goodput_outlook import AUTOMATIC, BY_HAND, HOUR, Outlook, Plan
from trainwright.trainers.plan.wording import percent, spoken

CURVES = """
.third { --c: var(--good); } .fourth { --c: var(--bad); } .curve.third, .curve.fourth { stroke-dasharray: 5 4; }
.cause-saves { --m: var(--two); } .formula { font: 14px/1.6 ui-monospace, Menlo, Consolas, monospace; }
p.note { color: var(--quiet); max-width: 72ch; } td.number, th.number { text-align: right; }
"""
FORMULA = """utilisation = L · interval · E[exp(−L · restart)] · exp(−L · save)
              / (exp(L · (interval + stall)) − 1)

L         failures a second, 1 / MTBF
interval  seconds of work between saves; the best one makes (exp(L · (interval + stall)) − 1) / interval least
stall     a save holds the loop, and slows the steps beside it
save      it is written beside the training: a failure before its end falls back to the save before
restart   from a failure to the next step; a failure in it begins it anew"""


def page(plan: Plan) -> str:
    """The page, from nothing but `plan`."""
    best = plan.outlook
    title = f"Goodput of {plan.on.nodes:,} nodes"
    figures = (
        ("Effective utilisation", percent(best.utilisation), "by the formula"),
        *(
            [("Simulated", percent(plan.mean), f"{len(plan.runs):,} runs of {plan.days:g} days")]
            if plan.runs
            else []
        ),
        ("Best interval", spoken(best.interval), f"{best.steps:,} steps" if best.steps else ""),
        ("Between failures", spoken(best.costs.mtbf), f"{plan.on.failures_per_node_hour:g} a node-hour"),
        ("Restart", spoken(best.costs.mean_restart), "mean"),
        ("Published, automatic", f"{AUTOMATIC} %", "128 trn1.32xlarge"),
        ("Published, by hand", f"{BY_HAND} %", "128 trn1.32xlarge"),
    )
    items = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)} <small>{escape(note)}</small></dd></div>"
        for name, value, note in figures
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{STYLE}{CURVES}</style></head>\n<body>\n<h1>{title}</h1>"
        '<p class="outcome">The share of the time that trains the model, over all failures and restarts</p>'
        f"<dl>{items}</dl>\n{_losses(plan)}\n{_plots(plan)}\n{_parts(plan)}\n{_restarts(plan)}\n{_rates(plan)}\n"
        f"<h2>Formula</h2><pre>{FORMULA}</pre>\n"
        '<p class="note">Failures come at random, at the same rate at any time (exponential). With a fixed '
        "restart and a synchronous save this is Daly's complete cost function (2006), whose optimum to first "
        "order is Young's (1974). The published figures are those of the AWS blog “End-to-end LLM training on "
        "instance clusters with over 100 nodes using AWS Trainium”: two runs, which differ in more than how "
        "they recovered.</p>\n</body></html>\n"
    )


def _losses(plan: Plan) -> str:
    """Where the time goes, as one bar."""
    styles = ("cause-saves", "cause-redone_steps", "cause-down")
    shares = [("trains the model", "cause-productive", plan.outlook.utilisation)]
    shares += [
        (name, style, share) for (name, share), style in zip(plan.outlook.losses.items(), styles, strict=True)
    ]
    bar = "".join(f'<i class="{style}" style="width:{share:.3%}"></i>' for _, style, share in shares)
    keys = "".join(
        f'<span class="{style}"><i></i>{name} {percent(share)}</span>' for name, style, share in shares
    )
    return (
        f'<h2>Where the time goes</h2><div class="bar">{bar}</div><div class="legend causes">{keys}</div>'
        '<p class="note">Losses to first order in the rate of failures.</p>'
    )


def _plots(plan: Plan) -> str:
    best = plan.outlook
    figures = []
    if not math.isinf(best.interval):
        minutes = np.array([at / 60 for at, _, _ in plan.by_interval])
        formula = np.array([100 * share for _, share, _ in plan.by_interval])
        simulated = np.array(
            [100 * share if share is not None else math.nan for _, _, share in plan.by_interval]
        )
        curves = [Curve("formula", "main", minutes, formula)]
        if np.isfinite(simulated).any():
            seen = np.isfinite(simulated)
            curves.append(Curve("simulated", "second", minutes[seen], simulated[seen]))
        curves.append(_level("published, automatic recovery", "third", AUTOMATIC, minutes[-1]))
        mark = Mark(best.interval / 60, "resume", f"best: {spoken(best.interval)}")
        figures.append(
            draw(
                Plot("Utilisation by interval", "%, minutes between saves", curves, over="minutes"),
                minutes[-1],
                [mark],
            )
        )
    hours = np.array([o.costs.mtbf / HOUR for o in plan.by_mtbf])
    shares = np.array([100 * o.utilisation for o in plan.by_mtbf])
    at_best = Curve("best interval, formula", "main", hours, shares)
    automatic = _level("published, automatic recovery", "third", AUTOMATIC, hours[-1])
    by_hand = _level("published, by hand", "fourth", BY_HAND, hours[-1])
    marks = (
        [Mark(best.costs.mtbf / HOUR, "resume", "this cluster")] if best.costs.mtbf / HOUR <= hours[-1] else []
    )
    for levels in ([automatic], [automatic, by_hand]):
        shown = Plot("Utilisation by failures", "%, hours between failures", [at_best, *levels], over="hours")
        figures.append(draw(shown, hours[-1], marks))
    return f'<h2>Curves</h2><div class="plots">{"".join(figure for figure, _ in figures)}</div>'


def _level(name: str, style: str, value: float, until: float) -> Curve:
    return Curve(name, style, np.linspace(0, until, 50), np.full(50, value))


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int]) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        styles = [f' class="{"number narrow" if i in numbers else ""}"' for i in range(len(cells))]
        found = zip(cells, styles, strict=True)
        return f"<tr>{''.join(f'<{tag}{style}>{escape(cell)}</{tag}>' for cell, style in found)}</tr>"

    return f"<h2>{title}</h2><table>{row(head, 'th')}{''.join(row(cells, 'td') for cells in rows)}</table>"


def _parts(plan: Plan) -> str:
    rows = [
        (part.name, "" if part.measured is None else spoken(part.measured), spoken(part.seconds), part.rule)
        for part in plan.parts.values()
    ]
    return _table("Parts", ("Part", "Measured", "Cluster", "Rule"), rows, (1, 2))


def _restarts(plan: Plan) -> str:
    rows = [(kind.name, f"{kind.share:.0%}", spoken(kind.seconds), "") for kind in plan.outlook.costs.restarts]
    return _table("Restarts", ("Failure", "Share", "Down", ""), rows, (1, 2))


def _rates(plan: Plan) -> str:
    rows = [(*rate_row(name, outlook), "") for name, outlook in plan.by_rate.items()]
    return _table("By rate of failures", (*RATE_HEAD, ""), rows, (1, 2, 3))


RATE_HEAD = ("Failures of a node-hour", "One every", "Best interval", "Utilisation")


def rate_row(name: str, outlook: Outlook) -> tuple[str, str, str, str]:
    """A line of the table by rate."""
    return name, spoken(outlook.costs.mtbf), spoken(outlook.interval), percent(outlook.utilisation)
