"""plan.html: one self-contained page that shows a layout's memory, time and traffic."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from trainwright.trainers.observers.page_style import STYLE
from trainwright.trainers.plan.layout import PARTS, Layout
from trainwright.trainers.plan.step_time import __doc__ as assumptions
from trainwright.trainers.plan.wording import differences, gib, percent, spoken

COLOURS = ("one", "two", "good", "warn", "bad", "other", "quiet")
BARS = """
.bar i, .legend i { background: var(--m); } p.note, ol.note { color: var(--quiet); max-width: 80ch; }
td.number, th.number { text-align: right; white-space: nowrap; }
""" + "".join(f".c{number} {{ --m: var(--{name}); }} " for number, name in enumerate(COLOURS))


FITS = {
    True: "It fits",
    False: "It needs more memory than there is",
    None: "Nothing says how much memory there is",
}


def page(layout: Layout, rehearsal: Mapping[str, Any] | None = None) -> str:
    """The page. rehearsal: as `rehearsal_verb.rehearsal_json` has it."""
    cluster, degrees = layout.recipe.cluster, layout.degrees
    title = f"{layout.ranks:,} ranks" + (f" on {cluster.instance}" if cluster.instance else "")
    mesh = (
        " × ".join(f"{axis} {degree}" for axis, degree in degrees._asdict().items() if degree > 1) or "one rank"
    )
    figures = [
        ("Layout", mesh),
        ("Parameters", f"{layout.parameters:,}"),
        ("Memory", gib(layout.memory[1].total)),
    ]
    if layout.room is not None:
        figures.append(("Room", gib(layout.room)))
    if layout.timed:
        figures += [
            ("A step", spoken(layout.time.total)),
            ("Tokens a second", f"{layout.tokens_per_s:,.0f}"),
            ("MFU", percent(layout.mfu)),
            ("Limited by", layout.binds),
        ]
        if layout.usd_per_billion_tokens is not None:
            figures.append(("10⁹ tokens", f"{layout.usd_per_billion_tokens:,.0f} USD"))
    items = "".join(
        f'<div><dt>{escape(name)}</dt><dd class="words">{escape(value)}</dd></div>' for name, value in figures
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Plan: {escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{STYLE}{BARS}</style></head>\n<body>\n<h1>{escape(title)}</h1>"
        f'<p class="outcome">{escape(_outcome(layout, rehearsal))}</p><dl>{items}</dl>\n{_memory(layout)}\n'
        f"{_time(layout)}\n{_rehearsal(rehearsal) if rehearsal else ''}\n{_traffic(layout)}\n"
        "</body></html>\n"
    )


def _outcome(layout: Layout, rehearsal: Mapping[str, Any] | None) -> str:
    if rehearsal is None:
        return f"{FITS[layout.fits]}; all by arithmetic, nothing was run"
    most = max(one["memory"]["total"] for one in rehearsal["ranks"])
    fits = None if layout.room is None else layout.fits is True and most <= layout.room
    return f"{FITS[fits]}; by arithmetic, and a step was rehearsed without memory"


def _rehearsal(record: Mapping[str, Any]) -> str:
    """What each rank held, and where that isn't what the arithmetic says."""
    first = record["ranks"][0]
    head = ("Rank", *first["memory"], "Beside arithmetic", "Collectives")
    rows = [
        (
            str(one["rank"]),
            *map(gib, one["memory"].values()),
            f"{one['memory_ratio']:.3f}",
            "the same" if one["as_by_arithmetic"] else "others",
        )
        for one in record["ranks"]
    ]
    said = "".join(f"<p>{escape(line)}</p>" for line in differences(record))
    return f"<h2>Rehearsed, on {escape(record['platform'])}</h2>{_table(head, rows)}{said}"


def _memory(layout: Layout) -> str:
    rank, memory = layout.memory
    where = f" (place {rank} of the pipeline)" if layout.degrees.pp > 1 else ""
    shown = {kind: (size, gib(size)) for kind, size in memory._asdict().items()}
    if layout.room is not None and layout.fits:
        shown["free"] = (int(layout.room) - memory.total, gib(layout.room - memory.total))
    return f"<h2>Memory of a rank at its highest{where}</h2>{_bar(shown)}"


def _time(layout: Layout) -> str:
    if not layout.timed:
        return ""
    shown = {PARTS[part]: (took, spoken(took)) for part, took in layout.time._asdict().items() if took}
    rows = "".join(f"<p>{escape(line)}</p>" for line in (assumptions or "").split("\n\n")[1:])
    notes = f'<details><summary>Assumptions</summary><div class="note">{rows}</div></details>'
    return f"<h2>A step</h2>{_bar(shown)}{notes}"


def _bar(parts: Mapping[str, tuple[float, str]]) -> str:
    """Parts of a whole, by size; each with its words."""
    whole = sum(size for size, _ in parts.values())
    styled = [(f"c{number % len(COLOURS)}", name, *part) for number, (name, part) in enumerate(parts.items())]
    bar = "".join(f'<i class="{style}" style="width:{size / whole:.3%}"></i>' for style, _, size, _ in styled)
    keys = "".join(
        f'<span class="{style}"><i></i>{escape(name)} {escape(said)}</span>' for style, name, _, said in styled
    )
    return f'<div class="bar">{bar}</div><div class="legend causes">{keys}</div>'


def _traffic(layout: Layout) -> str:
    head = ("Axis", "Collective", "What", "Calls", "Sent by a rank", "Link", "Alone", "")
    rows = [
        (
            one.axis,
            one.kind,
            one.what,
            f"{one.calls:,}",
            f"{layout.crosses(one) / 1e6:,.1f} MB",
            layout.link(one.axis),
            spoken(layout.takes(one)) if layout.timed else "",
            "",
        )
        for one in layout.traffic
    ]
    return f"<h2>What a step sends</h2>{_table(head, rows)}" if rows else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"

    return f"<table>{row(head, 'th')}{''.join(row(cells, 'td') for cells in rows)}</table>"
