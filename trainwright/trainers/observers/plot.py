"""Curves over steps, and bars, as inline SVG.

Positions along both axes are percentages of the drawing and texts stand in pixels, so a plot fills any width
while its letters keep their size.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

POINTS = 1500  # of a curve, at most
DOTTED = 24  # points, up to which each has a dot
GRAIN = 10_000  # units of a drawing's inner coordinates


@dataclass(frozen=True)
class Curve:
    """One line of a plot; `style` is its class in the style sheet. NaN makes a gap."""

    name: str
    style: str
    steps: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class Mark:
    """Something that happened at a step; `style` is its class in the style sheet."""

    step: float
    style: str
    text: str


@dataclass(frozen=True)
class Plot:
    """Curves over the same axes; the first one's steps are those that hovering finds."""

    title: str
    unit: str
    curves: Sequence[Curve]
    reference: tuple[str, float] | None = None  # a dashed line across, with its name
    from_zero: bool = False  # an amount, whose axis starts at zero
    over: str = "steps"  # what the axis below counts


@dataclass(frozen=True)
class Axis:
    """Where a value stands between `low` (0) and `high` (1)."""

    low: float
    high: float
    logarithmic: bool = False

    def place(self, values: np.ndarray) -> np.ndarray:
        if self.logarithmic:
            return np.log(values / self.low) / math.log(self.high / self.low)
        return (values - self.low) / (self.high - self.low)

    def at(self, value: float) -> float:
        return float(self.place(np.array(value)))


def thin(steps: np.ndarray, values: np.ndarray, points: int = POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most `points` of a curve: the least and the greatest of each stretch, and both ends.

    No extreme is lost, so a spike of one step in a million is still on the page.
    """
    if len(steps) <= points:
        return steps, values
    keep = {0, len(steps) - 1}
    for bucket in np.array_split(np.arange(len(steps)), (points - 2) // 2):
        finite = bucket[np.isfinite(values[bucket])]
        if len(finite):
            keep |= {int(finite[values[finite].argmin()]), int(finite[values[finite].argmax()])}
        else:
            keep.add(int(bucket[0]))  # a gap stays a gap
    chosen = np.array(sorted(keep))
    return steps[chosen], values[chosen]


def running_median(
    steps: np.ndarray, values: np.ndarray, window: int, points: int = POINTS // 2
) -> tuple[np.ndarray, np.ndarray]:
    """The median of the finite values within `window` steps, around at most `points` evenly spaced ones.

    A mean would show a spike of one step as a plateau.
    """
    centers = np.unique(np.linspace(0, len(steps) - 1, min(points, len(steps))).round().astype(int))
    around = [values[max(0, center - window // 2) : center + window // 2 + 1] for center in centers]
    finite = [part[np.isfinite(part)] for part in around]
    return steps[centers], np.array([np.median(part) if len(part) else np.nan for part in finite])


def value_axis(values: np.ndarray, from_zero: bool) -> Axis:
    """An axis around the finite `values`: logarithmic where an outlier would flatten all the rest."""
    values = values[np.isfinite(values)]
    if not len(values):
        return Axis(0, 1)
    low, high = float(values.min()), float(values.max())
    if from_zero and low >= 0:
        return Axis(0, high * 1.06 or 1)
    if low > 0 and high > 12 * float(np.median(values)):
        return Axis(low / 1.15, high * 1.15, logarithmic=True)
    margin = (high - low) * 0.05 or abs(high) * 0.05 or 1
    return Axis(low - margin, high + margin)


def ticks(axis: Axis, count: int = 5) -> list[float]:
    """Round numbers on the axis, about `count` of them."""
    if axis.logarithmic:
        powers = range(math.floor(math.log10(axis.low)), math.ceil(math.log10(axis.high)) + 1)
        for digits in ((1, 2, 5), (1, 3), (1,)):
            found = [d * 10.0**p for p in powers for d in digits if axis.low <= d * 10.0**p <= axis.high]
            if len(found) <= count + 2:
                break
        return found[:: math.ceil(len(found) / (count + 2))]
    rough = (axis.high - axis.low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    gap = min((power * digit for digit in (1, 2, 2.5, 5, 10)), key=lambda size: abs(size - rough))
    first = math.ceil(axis.low / gap - 1e-9)
    return [i * gap for i in range(first, math.floor(axis.high / gap + 1e-9) + 1)]


def short(value: float) -> str:
    """`0.5`, `3e-4`, `12.5 k`, `1.2 M`: a number for an axis, in four digits or fewer."""
    size = abs(value)
    if size and size < 1e-2:
        digits, power = f"{value:.2e}".split("e")
        return f"{float(digits):g}e{int(power)}"
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if size >= limit * 0.9999:
            return f"{value / (1e3 if unit == 'k' else limit):.4g} {unit}"
    return f"{value:.4g}"


def draw(plot: Plot, last_step: float, marks: Sequence[Mark] = ()) -> tuple[str, dict[str, Any]]:
    """The figure, and what the page's script needs to show values: axes and points."""
    curves = [curve for curve in plot.curves if len(curve.steps)]
    reference = [plot.reference[1]] if plot.reference else []
    axis = value_axis(np.concatenate([*(curve.values for curve in curves), reference]), plot.from_zero)
    thinned = [(curve, *thin(curve.steps, curve.values)) for curve in curves]
    time = Axis(0, max(1.0, last_step))
    parts = [*_grid(time, axis), *_mark_lines(time, marks)]
    above: list[str] = []
    if plot.reference:
        name, value = plot.reference
        height = _percent(1 - axis.at(value))
        parts.append(f'<line class="reference" x1="0" x2="100%" y1="{height}" y2="{height}"/>')
        above.append(f'<text class="reference" x="100%" y="{height}" dy="-6">{escape(name)} {value:.3f}</text>')
    parts.append(f'<svg viewBox="0 0 {GRAIN} {GRAIN}" preserveAspectRatio="none" width="100%" height="100%">')
    parts += [
        f'<path class="curve {curve.style}" d="{_path(time.place(steps), axis.place(values))}"/>'
        for curve, steps, values in thinned
    ]
    parts.append("</svg>")
    parts += [
        f'<circle class="{curve.style}" cx="{_percent(x)}" cy="{_percent(1 - y)}" r="3.5"/>'
        for curve, steps, values in thinned
        if len(steps) <= DOTTED
        for x, y in zip(time.place(steps), axis.place(values), strict=True)
        if math.isfinite(y)
    ]
    parts += above
    legend = "".join(
        f'<span class="key {curve.style}"><i></i>{escape(curve.name)} <b></b></span>' for curve in curves
    )
    scale = ", log scale" if axis.logarithmic else ""
    caption = (
        f'<span class="what">{escape(plot.title)}</span> <span class="unit">{escape(plot.unit)}{scale}</span>'
        f'<span class="keys"><span class="at"></span>{legend}</span>'
    )
    label = f"{escape(plot.title)} over {escape(plot.over)}"
    drawing = f'<svg class="area" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    figure = f"<figure><figcaption>{caption}</figcaption>{drawing}</figure>"
    data = {
        "x": [time.low, time.high],
        "y": [axis.low, axis.high],
        "log": axis.logarithmic,
        "curves": [
            {"style": curve.style, "steps": [int(step) for step in steps], "values": _rounded(values)}
            for curve, steps, values in thinned
        ],
    }
    return figure, data


def bars(title: str, unit: str, counts: Mapping[str, int]) -> str:
    """A figure of bars from zero, one a name, each with its count above it."""
    wide, most = 1 / len(counts), max(counts.values())
    parts = ['<line class="floor" x1="0" x2="100%" y1="100%" y2="100%"/>']
    for place, (name, count) in enumerate(counts.items()):
        left, middle, high = place * wide, (place + 0.5) * wide, count / most
        parts.append(
            f'<rect x="{_percent(left + 0.1 * wide)}" width="{_percent(0.8 * wide)}" '
            f'y="{_percent(1 - high)}" height="{_percent(high)}"/>'
            f'<text class="x" x="{_percent(middle)}" y="100%" dy="20">{escape(name)}</text>'
        )
        if count:
            at = f'x="{_percent(middle)}" y="{_percent(1 - high)}" dy="-6"'
            parts.append(f'<text class="x" {at}>{count:,}</text>')
    caption = f'<span class="what">{escape(title)}</span> <span class="unit">{escape(unit)}</span>'
    drawing = f'<svg class="bars" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
    return f"<figure><figcaption>{caption}</figcaption>{drawing}</figure>"


def _grid(time: Axis, axis: Axis) -> list[str]:
    parts = []
    for value in ticks(axis):
        y = _percent(1 - axis.at(value))
        parts.append(f'<line class="grid" x1="0" x2="100%" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="y" x="-8" y="{y}" dy=".32em">{short(value)}</text>')
    parts.append('<line class="floor" x1="0" x2="100%" y1="100%" y2="100%"/>')
    for value in ticks(time):
        x = _percent(time.at(value))
        parts.append(f'<line class="floor" x1="{x}" x2="{x}" y1="100%" y2="100%" transform="translate(0 4)"/>')
        parts.append(f'<text class="x" x="{x}" y="100%" dy="20">{short(value)}</text>')
    return parts


def _mark_lines(time: Axis, marks: Sequence[Mark]) -> list[str]:
    """A line up from the step axis for each mark: as high as its style says."""
    return [
        f'<g class="mark {mark.style}"><title>{escape(mark.text)}</title>'
        f'<line x1="{x}" x2="{x}" y1="0" y2="100%"/><rect x="{x}" y="100%" width="7" height="7"/></g>'
        for mark in marks
        for x in [_percent(time.at(mark.step))]
    ]


def _path(x: np.ndarray, y: np.ndarray) -> str:
    """Points as an SVG path, lifted where one isn't finite."""
    parts: list[str] = []
    drawing = False
    for across, up in zip(x, y, strict=True):
        if math.isfinite(up):
            parts.append(f"{'' if drawing else 'M'}{across * GRAIN:.0f} {(1 - up) * GRAIN:.0f}")
        drawing = math.isfinite(up)
    return " ".join(parts)


def _percent(share: float) -> str:
    return f"{share * 100:.2f}%"


def _rounded(values: np.ndarray) -> list[float | None]:
    return [float(f"{value:.7g}") if math.isfinite(value) else None for value in values]
