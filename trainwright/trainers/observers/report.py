"""report.html: one self-contained page that shows a run, made of nothing but the run's folder."""

import json
import logging
import math
import os
import time
from bisect import bisect_left
from collections.abc import Iterator
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from trainwright.trainers.goodput import CAUSES
from trainwright.trainers.observers.base import Metrics, Observer, Progress
from trainwright.trainers.observers.page_style import SCRIPT, STYLE
from trainwright.trainers.observers.plot import Curve, Mark, Plot, bars, draw, running_median, short
from trainwright.trainers.observers.run_record import Column, Event, RunRecord, read_run
from trainwright.trainers.observers.time_left import duration

log = logging.getLogger(__name__)

EVENTS = 300  # rows of the table, the newest
MARKS = 200  # of one kind on the step axis
NOT_MARKED = (
    "start",
    "unigram",
    "validation",
    "sample",
    "checkpoint_begun",
    "rollback_begun",
    "ranks",
)  # they begin the axis, or stand elsewhere on the page
MARK_STYLES = {
    "checkpoint": "checkpoint",
    "resume": "resume",
    "restart": "resume",
    "rollback": "resume",
    "spike": "spike",
    "not finite": "spike",
    "stop": "stop",
}
LENGTHS = (1, 2, 3, 4, 8, 16, 32)  # of spikes, in steps: up to which a bar counts; one more for longer ones
# What each axis of the layout cuts up.
AXES = {
    "dp_replicate": "batches; weights are copied",
    "dp_shard": "batches; weights, gradients and optimizer state are sharded",
    "tp": "the matrices of each layer",
    "sp": "the sequence, between the matrices that tp cuts",
    "pp": "the layers",
    "pp_schedule": "the order in which stages do the micro-batches",
    "pp_stages": "stages of each rank",
    "ep": "the experts",
    "zero": "ZeRO stage: what dp_shard shards",
    "engine": "what carries it out",
}


class Report(Observer):
    """Writes `report.html` when the run stops, and at most every `every` seconds before that.

    A long run's page takes longer to write, so the time between two also grows: to a hundred times what the
    last took.
    """

    def __init__(self, folder: Path, every: float = 60.0) -> None:
        self.folder = folder
        self.every = every
        self.due = time.monotonic() + every

    def on_step(self, progress: Progress, metrics: Metrics) -> None:
        if time.monotonic() >= self.due:
            self._write()

    def on_stop(self, progress: Progress, reason: str) -> None:
        self._write()

    def _write(self) -> None:
        began = time.monotonic()
        try:
            write_report(self.folder)
        except Exception:  # a picture isn't worth a run
            log.warning("report.html could not be written", exc_info=True)
        now = time.monotonic()
        self.due = now + max(self.every, 100 * (now - began))


def write_report(folder: Path) -> Path:
    """Write `report.html` from the files of a run's folder and return its path.

    Missing files and keys leave their part of the page out.
    """
    page = render(read_run(folder))
    path = folder / "report.html"
    fresh = folder / "report.html.new"
    fresh.write_text(page, encoding="utf-8")
    os.replace(fresh, path)
    return path


def render(run: RunRecord) -> str:
    """The page. Everything that the folder says is escaped on its way in."""
    name = escape(run.name)
    plots, data = _plots(run)
    numbers = json.dumps(data, separators=(",", ":"))  # nothing in it but numbers and our own class names
    what_happened = (plots, _spikes(run), _sample(run), _goodput(run))
    sections = (_header(run), _figures(run), *what_happened, _layout(run), _details(run))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(section for section in sections if section)
        + f'\n<script type="application/json" id="data">{numbers}</script>\n'
        f"<script>{SCRIPT}</script>\n</body></html>\n"
    )


def _header(run: RunRecord) -> str:
    total = run.section("train").get("steps")
    steps = f"step {run.last_step:,}" + (f" of {total:,}" if isinstance(total, int) else "")
    last = run.events[-1] if run.events else {}
    reason = str(last.get("reason", "stopped")).rstrip(": ") if last.get("event") == "stop" else None
    if reason == "done":
        style, outcome = "good", "Done"
    elif reason is not None:
        style, outcome = "bad", f"Stopped: {reason}"
    else:
        style, outcome = "", "Not finished" if run.last_step else "No steps yet"
    days = [str(event["time"])[:16].replace("T", " ") for event in (*run.events[:1], last) if "time" in event]
    when = f" · {' to '.join(dict.fromkeys(days))} UTC" if days else ""
    return (
        f'<h1>{escape(run.name)}</h1><p class="outcome"><b class="{style}">{escape(outcome)}</b> at {steps}'
        f"{escape(when)}</p>"
    )


def _figures(run: RunRecord) -> str:
    """The row of key figures; one that isn't known is left out."""
    figures: list[tuple[str, str, str]] = []

    def add(name: str, value: Any, note: str = "") -> None:
        if value is not None:
            figures.append((name, str(value), note))

    total, tokens = run.section("train").get("steps"), run.newest("tokens")
    add(
        "Steps",
        f"{run.last_step:,}",
        f"of {total:,}" if isinstance(total, int) and total != run.last_step else "",
    )
    add("Tokens", short(tokens) if tokens is not None else None)
    if (loss := run.newest("loss")) is not None:
        add("Final loss", f"{loss:.4f}", "nats a token")
    if (validation := run.newest("val_loss")) is not None:
        add("Validation loss", f"{validation:.4f}", f"at step {int(run.column('val_loss')[0][-1]):,}")
    speeds = run.column("tokens_per_s")[1]
    if np.isfinite(speeds).any():
        add("Throughput", f"{np.nanmedian(speeds):,.0f}", "tokens/s, median")
    shares = run.column("mfu")[1]
    if np.isfinite(shares).any():
        add("MFU", f"{np.nanmedian(shares) * 100:.1f} %", "median")
    wall = max(
        run.seconds or 0.0, sum(run.goodput.values())
    )  # the events begin later, goodput.json ends sooner
    add("Wall time", duration(wall) if wall else None)
    if (productive := run.goodput.get("productive")) is not None:
        add("Productive", f"{productive / sum(run.goodput.values()) * 100:.2f} %", "of the time")
    parameters = run.fact("parameters")
    add("Parameters", short(parameters) if isinstance(parameters, int | float) else parameters)
    add("Device", run.fact("device", "platform"))
    add("Layout", layout_words(run))
    items = "".join(
        f'<div><dt>{escape(name)}</dt><dd class="{"words" if len(value) > 12 else ""}">{escape(value)}'
        f"{f' <small>{escape(note)}</small>' if note else ''}</dd></div>"
        for name, value, note in figures
    )
    return f"<dl>{items}</dl>"


def layout_words(run: RunRecord) -> str | None:
    """`dp_shard 4 × tp 2`: the axes of more than one rank; None where the recipe isn't known."""
    degrees = _degrees(run)
    if not degrees:
        return None
    split = [f"{axis} {degree}" for axis, degree in degrees.items() if degree not in (1, "all")]
    return " × ".join(split) or ("dp_shard over all ranks" if "all" in degrees.values() else "one rank")


def _degrees(run: RunRecord) -> dict[str, int | str]:
    """The degree of each axis; dp_shard=-1 is what the others leave, `all` where the ranks aren't known."""
    parallel = run.section("parallel")
    degrees: dict[str, int | str] = {
        axis: parallel[axis]
        for axis in ("dp_replicate", "dp_shard", "tp", "pp", "ep")
        if isinstance(parallel.get(axis), int)
    }
    if degrees.get("dp_shard") == -1:
        ranks = run.fact("world_size", "ranks")
        taken = np.prod([int(degrees.get(axis, 1)) for axis in ("dp_replicate", "tp", "pp")])
        degrees["dp_shard"] = int(ranks // taken) if isinstance(ranks, int) else "all"
    return degrees


def _plots(run: RunRecord) -> tuple[str, list[dict[str, Any]]]:
    loss, nats = run.column("loss"), _newest_number(run.of_kind("unigram"), "nats")
    validation = Curve("validation", "second", *run.column("val_loss"))
    plots = [
        Plot(
            "Loss",
            "nats a token",
            [*_noisy("loss", loss), validation],
            reference=("unigram entropy", nats) if nats is not None else None,
        ),
        Plot("Gradient norm", "before clipping", _noisy("norm", run.column("grad_norm"))),
        Plot("Parameter norm", "", [Curve("norm", "main", *run.column("param_norm"))]),
        Plot("Learning rate", "", [Curve("rate", "main", *run.column("lr"))], from_zero=True),
        Plot("Throughput", "tokens/s", _noisy("throughput", run.column("tokens_per_s")), from_zero=True),
        Plot(
            "Step time",
            "seconds",
            [
                *_noisy("step", run.column("step_time_s")),
                Curve("of it waiting for data", "second", *run.column("data_time_s")),
            ],
            from_zero=True,
        ),
        Plot(
            "Memory",
            "GiB, peak of a device",
            [Curve("memory", "main", *run.column("memory_gib"))],
            from_zero=True,
        ),
    ]
    marks = list(_marks(run))
    drawn = [
        draw(plot, run.last_step, marks)
        for plot in plots
        if any(np.isfinite(curve.values).any() for curve in plot.curves)
    ]
    if not drawn:
        return "", []
    kinds = dict.fromkeys((mark.text.split(" at step ")[0], mark.style) for mark in marks)
    legend = "".join(f'<span class="{style}"><i></i>{escape(kind)}</span>' for kind, style in kinds)
    figures = [figure for figure, _ in drawn]
    if legend:
        figures[0] = figures[0].replace("</figure>", f'<div class="legend">{legend}</div></figure>')
    return f'<h2>Curves</h2><div class="plots">{"".join(figures)}</div>', [data for _, data in drawn]


def _noisy(name: str, column: Column) -> list[Curve]:
    """Each step's value, faint, under the running median of about a sixtieth of the run."""
    steps, values = column
    window = len(values) // 60 // 2 * 2 + 1
    if window < 3:
        return [Curve(name, "main", steps, values)]
    median = Curve(f"median of {window}", "main", *running_median(steps, values, window))
    return [Curve(name, "raw", steps, values), median]


def _marks(run: RunRecord) -> Iterator[Mark]:
    steps, losses = run.column("loss")
    happened: list[tuple[str, float]] = [
        (str(event.get("event")), event["step"])
        for event in run.events
        if event.get("event") not in NOT_MARKED and type(event.get("step")) in (int, float)
    ]
    happened += [("not finite", step) for step in steps[~np.isfinite(losses)].tolist()]
    for kind in dict.fromkeys(kind for kind, _ in happened):
        of_kind = [step for other, step in happened if other == kind and 0 <= step <= run.last_step]
        for step in of_kind[:: -(-len(of_kind) // MARKS) or 1]:
            yield Mark(step, MARK_STYLES.get(kind, "event"), f"{kind} at step {step:,}")


def _spikes(run: RunRecord) -> str:
    """How long the spikes of the gradient norm were.

    One that a restart went through again counts once; after a rollback the step has another batch. Those of
    numbers that weren't finite aren't spikes of a height.
    """
    spikes: dict[tuple[int, Any], Event] = {}
    rollbacks = 0
    for event in run.events:
        rollbacks += event.get("event") == "rollback"
        if event.get("event") == "spike" and type(event.get("length")) is int and _is_high(event):
            spikes[rollbacks, event.get("step")] = event
    if not spikes:
        return ""
    counts = dict.fromkeys(range(len(LENGTHS) + 1), 0)
    for event in spikes.values():
        counts[bisect_left(LENGTHS, event["length"])] += 1
    names = [
        str(last) if last == before + 1 else f"{before + 1} to {last}"
        for before, last in pairwise((0, *LENGTHS))
    ]
    named = dict(zip([*names, f"over {LENGTHS[-1]}"], counts.values(), strict=True))
    figure = bars("Lengths of the spikes", f"steps; {len(spikes):,} in all", named)
    return f'<h2>Spikes of the gradient norm</h2><div class="plots">{figure}</div>'


def _is_high(spike: Event) -> bool:
    height = spike.get("height")
    return isinstance(height, int | float) and math.isfinite(height)


def _sample(run: RunRecord) -> str:
    samples = run.of_kind("sample")
    if not samples:
        return ""
    prompt, text = (str(samples[-1].get(key, "")) for key in ("prompt", "text"))
    continued = text.removeprefix(prompt)
    return (
        f"<h2>What the model writes</h2>"
        f'<pre><span class="prompt">{escape(prompt)}</span>{escape(continued)}</pre>'
    )


def _goodput(run: RunRecord) -> str:
    """Where the time went, as one bar."""
    total = sum(run.goodput.values())
    if not total:
        return ""
    styles = {cause: f"cause-{cause if cause in CAUSES else 'other'}" for cause in run.goodput}
    bar = "".join(
        f'<i class="{styles[cause]}" style="width:{seconds / total:.3%}"></i>'
        for cause, seconds in run.goodput.items()
    )
    keys = "".join(
        f'<span class="{styles[cause]}"><i></i>{escape(cause.replace("_", " "))} {seconds / total:.1%}'
        f" · {duration(seconds)}</span>"
        for cause, seconds in run.goodput.items()
    )
    return f'<h2>Where the time went</h2><div class="bar">{bar}</div><div class="legend causes">{keys}</div>'


def _layout(run: RunRecord) -> str:
    parallel = {**run.section("parallel"), **_degrees(run)}
    rows = "".join(
        f'<tr><td>{escape(key)}</td><td class="narrow">{escape(_word(value))}</td>'
        f'<td class="quiet">{escape(AXES.get(key, ""))}</td></tr>'
        for key, value in parallel.items()
        if value is not None
    )
    if not rows:
        return ""
    return f"<h2>Layout</h2><table><tr><th>Axis</th><th>Degree</th><th>Cuts up</th></tr>{rows}</table>"


def _details(run: RunRecord) -> str:
    """What a reader looks up rather than reads, folded away."""
    parts = []
    if run.events:
        rows = "".join(_event_row(event) for event in run.events[-EVENTS:])
        left_out = f", the newest {EVENTS}" if len(run.events) > EVENTS else ""
        head = "<tr><th>Time (UTC)</th><th>Event</th><th>Step</th><th></th></tr>"
        parts.append(_folded("Events", f"{len(run.events):,}{left_out}", f"<table>{head}{rows}</table>"))
    if run.config_text:
        parts.append(_folded("Configuration", "as resolved", f"<pre>{escape(run.config_text)}</pre>"))
    if versions := run.section("versions"):
        rows = "".join(
            f"<tr><td>{escape(str(name))}</td><td>{escape(_word(value))}</td></tr>"
            for name, value in versions.items()
        )
        parts.append(_folded("Versions", f"{len(versions)}", f"<table>{rows}</table>"))
    return f'<div class="details">{"".join(parts)}</div>' if parts else ""


def _folded(title: str, note: str, body: str) -> str:
    return f"<details><summary>{title} <span>{note}</span></summary>{body}</details>"


def _event_row(event: Event) -> str:
    when = str(event.get("time", ""))[:19].replace("T", " ")
    step = event.get("step")
    rest = {key: value for key, value in event.items() if key not in ("time", "event", "step")}
    words = "  ".join(f"{key} {_word(value)}" for key, value in rest.items() if value is not None)
    return (
        f'<tr><td>{escape(when)}</td><td class="narrow">{escape(str(event.get("event", "")))}</td>'
        f'<td class="narrow">{escape(_word(step)) if step is not None else ""}</td>'
        f'<td class="quiet">{escape(words if len(words) <= 160 else words[:159] + "…")}</td></tr>'
    )


def _word(value: object) -> str:
    """A value as the recipe writes it."""
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _newest_number(events: list[Event], key: str) -> float | None:
    numbers = [event[key] for event in events if type(event.get(key)) in (int, float)]
    return float(numbers[-1]) if numbers else None
