"""Tools keep to their time, and leave nothing behind."""

import os
import time
from pathlib import Path

import pytest

from trainwright.trainers.platform.tools import Unavailable, first_line_of, output_of


def gone(number: Path) -> bool:
    """Whether the process has ended, in whatever time that takes."""
    until = time.monotonic() + 20
    while time.monotonic() < until:
        try:
            if Path(f"/proc/{int(number.read_text())}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.02)
    return False


CHILD = 'sleep 50 & echo $! > "$0"; {says} wait'


def test_a_tool_is_ended_with_what_it_has_started(tmp_path: Path):
    started = time.monotonic()
    with pytest.raises(Unavailable, match="no answer in 1 s"):
        output_of("sh", "-c", CHILD.format(says=""), str(tmp_path / "child"), timeout=1.0)
    assert time.monotonic() - started < 40
    assert gone(tmp_path / "child")


def test_one_whose_child_is_all_that_is_left(tmp_path: Path):
    started = time.monotonic()
    for ask in (output_of, first_line_of):
        with pytest.raises(Unavailable, match="no answer in 1 s"):
            ask("sh", "-c", 'sleep 50 & echo $! > "$0"', str(tmp_path / "child"), timeout=1.0)
        assert gone(tmp_path / "child")
    assert time.monotonic() - started < 40


def test_one_that_goes_on_for_ever(tmp_path: Path):
    words = ("sh", "-c", CHILD.format(says="echo a line;"), str(tmp_path / "child"))
    assert first_line_of(*words, timeout=20.0) == "a line\n"
    assert gone(tmp_path / "child")


def test_what_a_tool_prints():
    assert output_of("sh", "-c", "echo well; echo ill >&2", timeout=20.0) == "well\n"
    with pytest.raises(Unavailable, match="status 3: ill"):
        output_of("sh", "-c", "echo ill >&2; exit 3", timeout=20.0)
    with pytest.raises(Unavailable, match="not installed"):
        output_of(os.devnull + "x", timeout=20.0)
