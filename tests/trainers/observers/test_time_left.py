import pytest

from trainwright.trainers.observers.time_left import WINDOW, TimeLeft, duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (12, "12s"), (59.6, "1m00s"), (250, "4m10s"), (3900, "1h05m"), (183600, "2d03h")],
)
def test_a_duration_has_its_two_largest_units(seconds, text):
    assert duration(seconds) == text


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


def test_the_first_step_of_a_run_does_not_count(clock):
    left = TimeLeft(10)
    clock[0] = 1000.0
    assert left.after(1) is None
    clock[0] += 2
    assert left.after(2) == pytest.approx(16)


def test_it_forgets_steps_before_its_window(clock):
    left = TimeLeft(1000)
    for step in range(1, 101):
        clock[0] += 100
        left.after(step)
    for step in range(101, 102 + WINDOW):
        clock[0] += 1
        last = left.after(step)
    assert last == pytest.approx(1000 - 101 - WINDOW)


def test_a_run_without_a_known_end_has_none(clock):
    left = TimeLeft(None)
    assert [left.after(1), left.after(2)] == [None, None]
