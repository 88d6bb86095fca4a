"""A run that loses a node, goes on without it and takes it back, has the numbers of one that was left alone."""

import sys
from collections.abc import Iterator
from contextlib import closing
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from tests.launch.nodes import Run, until
from trainwright.cli import main
from trainwright.trainers.observers.json_lines import last_record, read_lines

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="elsewhere orphans can't be taken in"),
]
MORE = ("platform=cpu", "train.steps=200", "train.validate_every=null", "checkpoint.every=5")


@pytest.fixture
def words(tiny: list[str]) -> list[str]:
    return [word for word in tiny if not word.startswith("run.name=")] + list(MORE)


@pytest.fixture
def run(tmp_path: Path, words: list[str]) -> Iterator[Run]:
    with closing(Run(tmp_path, "launch.nodes=1:2", *words)) as made:
        yield made


def read(folder: Path, name: str) -> list[dict[str, Any]]:
    return [record for _, record in read_lines(folder / f"{name}.jsonl")]


def sizes(folder: Path) -> list[int]:
    """Of the worlds that have begun to train, one after the other."""
    began = [event["world_size"] for event in read(folder, "events") if event["event"] in ("start", "resume")]
    return [size for size, _ in groupby(began)]


def trains(folder: Path, worlds: list[int], steps: int) -> bool:
    """Whether the last of these worlds has made so many steps."""
    if sizes(folder) != worlds:
        return False
    began = [event for event in read(folder, "events") if event["event"] in ("start", "resume")][-1]
    return (last_record(folder / "metrics.jsonl") or {"step": 0})["step"] >= began.get("step", 0) + steps


def test_the_numbers_do_not_depend_on_who_was_there(run: Run, words: list[str], tmp_path: Path):
    assert main(["train", *words, "run.name=whole"]) == 0
    a, b = (run.node(name, WORKER="training.py") for name in "ab")
    until(lambda: trains(run.output, [2], 7), "steps on both nodes")
    b.kill_all()
    until(lambda: trains(run.output, [2, 1], 3), "steps on one node")
    run.nodes = [a]
    run.node("b", WORKER="training.py")
    until(lambda: trains(run.output, [2, 1, 2], 3), "steps on both nodes again")
    (tmp_path / "runs" / "go").touch()
    assert {node.name: node.ends() for node in run.nodes} == {"a": 0, "b": 0}

    whole, ours = (read(folder, "metrics") for folder in (tmp_path / "runs" / "whole", run.output))
    assert sizes(run.output) == [2, 1, 2]
    for name in ("step", "tokens"):
        assert [line[name] for line in ours] == [line[name] for line in whole]
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in whole], rel=1e-5)
