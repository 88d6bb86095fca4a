import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainwright.trainers.observers.plot import (
    Axis,
    Curve,
    Mark,
    Plot,
    draw,
    running_median,
    short,
    thin,
    ticks,
    value_axis,
)


def curve(values, name="loss", style="main"):
    return Curve(name, style, np.arange(1, len(values) + 1), np.array(values, float))


def test_thinning_keeps_the_extremes_and_the_ends():
    values = np.random.default_rng(0).normal(size=100_000)
    values[[12_345, 67_890]] = 50.0, -50.0
    steps, kept = thin(np.arange(100_000), values)
    assert len(steps) <= 1500
    assert {0, 12_345, 67_890, 99_999} <= set(steps.tolist())
    assert (kept == values[steps]).all()
    assert (np.diff(steps) > 0).all()


def test_thinning_leaves_a_short_curve_alone_and_a_gap_a_gap():
    short_curve = np.arange(1500), np.arange(1500.0)
    assert thin(*short_curve) == short_curve
    values = np.zeros(10_000)
    values[4000:5000] = np.nan
    steps, kept = thin(np.arange(10_000), values)
    assert np.isnan(kept[(steps > 4050) & (steps < 4950)]).all()
    assert np.isfinite(kept[(steps < 3950) | (steps > 5050)]).all()


def test_the_median_passes_over_a_spike_and_what_is_not_finite():
    values = np.full(300, 2.0)
    values[100], values[200] = 1e6, np.nan
    steps, medians = running_median(np.arange(300), values, window=5)
    assert steps.tolist() == list(range(300))
    assert (medians == 2.0).all()
    assert len(running_median(np.arange(9000), np.zeros(9000), 151)[0]) <= 750


@given(st.floats(-1e6, 1e6), st.floats(1e-4, 1e6))
def test_ticks_are_few_round_and_on_the_axis(low, width):
    axis = Axis(low, low + width)
    found = ticks(axis)
    assert 2 <= len(found) <= 9
    assert all(-1e-6 <= axis.at(value) <= 1 + 1e-6 for value in found)


def test_an_outlier_makes_the_axis_logarithmic():
    axis = value_axis(np.array([1.0] * 99 + [1e4]), from_zero=False)
    assert axis.logarithmic
    assert ticks(axis)
    assert axis.at(100.0) == pytest.approx(0.5, abs=0.05)
    assert not value_axis(np.array([8.0, 3.0, 2.0, 2.0]), from_zero=False).logarithmic


@pytest.mark.parametrize("values", [[], [np.nan], [0.0], [3.0, 3.0], [-1.0, 1.0]])
def test_any_values_have_an_axis(values):
    axis = value_axis(np.array(values), from_zero=True)
    assert axis.high > axis.low


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.5, "0.5"),
        (3e-4, "3e-4"),
        (8192, "8192"),
        (12_500, "12.5 k"),
        (5.9e6, "5.9 M"),
        (2e12, "2 T"),
    ],
)
def test_short_numbers(value, text):
    assert short(value) == text


def test_points_stand_where_their_values_do():
    figure, data = draw(Plot("Rate", "", [curve([5.0, np.nan, 10.0, 0.0])], from_zero=True), last_step=4)
    (path,) = re.findall(r' d="([^"]+)"', figure)
    top = data["y"][1]
    heights = [round((1 - value / top) * 10_000) for value in (5.0, 10.0, 0.0)]
    assert path == f"M2500 {heights[0]} M7500 {heights[1]} 10000 {heights[2]}"
    assert data["curves"][0] == {"style": "main", "steps": [1, 2, 3, 4], "values": [5.0, None, 10.0, 0.0]}


def test_marks_a_reference_and_names_are_drawn_and_escaped():
    plot = Plot("<Loss>", "n&t", [curve([3.0, 2.0], name="<i>")], reference=("<entropy>", 6.2))
    figure, data = draw(plot, 2, [Mark(1, "spike", "spike <b> at step 1")])
    for text in ("&lt;Loss&gt;", "n&amp;t", "&lt;i&gt;", "&lt;entropy&gt; 6.200", "spike &lt;b&gt; at step 1"):
        assert text in figure
    assert not re.search(r"<Loss|n&t|<i>\d|<i>[^<]|<entropy|spike <b>", figure)
    assert 'class="mark spike"' in figure
    assert '<line class="reference"' in figure
    assert data["y"][1] > 6.2
