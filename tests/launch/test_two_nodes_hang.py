"""A rank that stops where no other rank could kill it."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.launch.nodes import Run, until
from trainwright.trainers.observers.json_lines import last_record, read_lines

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="elsewhere orphans can't be taken in"),
]
MORE = ("platform=cpu", "train.steps=200", "train.validate_every=null", "checkpoint.every=5")


@pytest.fixture
def run(tmp_path: Path, tiny: list[str]) -> Iterator[Run]:
    words = [word for word in tiny if not word.startswith("run.name=")]
    with closing(Run(tmp_path, "launch.nodes=2", "resilience.hang_floor_s=5", *words, *MORE)) as made:
        yield made


def step(folder: Path) -> int:
    return int((last_record(folder / "metrics.jsonl") or {"step": 0})["step"])


def test_its_supervisor_ends_it(run: Run, tmp_path: Path):
    _, b = (run.node(name, WORKER="training.py") for name in "ab")
    until(lambda: (run.output / "metrics.jsonl").exists() and step(run.output) > 7, "steps on both nodes")
    (worker,) = b.children()
    os.kill(worker, signal.SIGSTOP)
    began, stopped_at = time.monotonic(), step(run.output)
    until(lambda: step(run.output) > stopped_at + 1, "the run in training again")
    print(f"in training again after {time.monotonic() - began:.1f} s")
    (tmp_path / "runs" / "go").touch()
    assert {node.name: node.ends() for node in run.nodes} == {"a": 0, "b": 0}
    assert "and its watchdog stopped answering, and it was killed" in b.said.read_text()
    (hang,) = [event for _, event in read_lines(run.output / "events.jsonl") if event["event"] == "hang"]
    assert "its beats stopped" in hang["reason"]
    assert run.left_behind() == []
