"""Two nodes on one machine, real torchruns: workers, supervisors and whole nodes that go, and come back."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.launch.nodes import Run, until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="elsewhere orphans can't be taken in"),
]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    made: list[Run] = []

    def make(*words: str) -> Run:
        made.append(Run(tmp_path, *words))
        return made[-1]

    yield make
    for run in made:
        run.close()


def both_at(run: Run, step: int, ranks: int = 2) -> None:
    until(lambda: all(node.at(step, ranks) for node in run.nodes), f"step {step} on both nodes")


def all_end(run: Run) -> dict[str, int]:
    ends = {node.name: node.ends() for node in run.nodes}
    assert run.left_behind() == []
    return ends


def test_a_killed_worker_is_replaced_in_place(start):
    """Hangs without TORCH_DISABLE_SHARE_RDZV_TCP_STORE (SHARED_STORE=1 in the environment): 4 of 4 times."""
    run = start("launch.nodes=2", "train.steps=40")
    a, b = run.node("a"), run.node("b")
    both_at(run, 5)
    b.kill_worker()
    assert all_end(run) == {"a": 0, "b": 0}
    assert [len(node.logs()) for node in (a, b)] == [2, 2]
    assert "starts again" not in a.said.read_text() + b.said.read_text()


def test_a_node_that_is_asked_back_saves_and_the_run_goes_on_when_it_is_there_again(start):
    run = start("launch.nodes=2", "train.steps=60")
    a, b = run.node("a"), run.node("b")
    both_at(run, 5)
    b.process.terminate()
    assert b.ends() == 75
    assert "with status 75: SIGTERM: saved, the same command goes on" in b.last_line()
    run.nodes = [a]
    run.node("b")
    assert all_end(run) == {"a": 0, "b": 0}


@pytest.mark.parametrize("rank", [0, 1])  # rank 0 hosts the ranks' store, and takes it along
def test_a_final_failure_ends_every_node_with_its_status(start, rank: int):
    run = start("launch.nodes=2")
    a, b = (run.node(name, FAULT=f"76:{rank}:3") for name in "ab")
    assert all_end(run) == {"a": 76, "b": 76}
    for node in (a, b):
        assert "(stopped for numerical reasons)" in node.last_line()
        assert "the fault at step 3" in node.last_line()
        assert len(node.logs()) == 1
    said = a.said.read_text() + b.said.read_text()
    assert said.count("trainwright: rank") == 1  # one rank spoke
    assert "lost the other ranks" not in said


def test_a_bad_node_leaves_and_the_other_goes_on(start):
    run = start("launch.nodes=1:2", "train.steps=20")
    a, b = run.node("a"), run.node("b", FAULT="77:1:3")
    assert b.ends() == 77
    assert "(bad node)" in b.last_line()
    assert a.ends() == 0
    assert a.logs().popitem()[1][-1] == ["20", "1"]
    assert run.left_behind() == []


def test_a_lost_node_is_done_without_and_taken_back(start):
    run = start("launch.nodes=1:2", "train.steps=400")
    a, b = run.node("a"), run.node("b")
    both_at(run, 5)
    b.kill_all()
    until(lambda: a.at(6, ranks=1), "steps on one node")
    run.nodes = [a]
    run.node("b")
    both_at(run, 7)
    for node in run.nodes:
        node.process.terminate()
    assert set(all_end(run).values()) == {75}


def test_the_loss_of_the_node_that_hosts_the_rendezvous(start):
    run = start("launch.nodes=2", "train.steps=60")
    a, b = run.node("a"), run.node("b")
    both_at(run, 5)
    a.kill_all()
    run.nodes = [b]
    run.node("a")
    assert all_end(run) == {"a": 0, "b": 0}
    assert "torchrun starts again" in b.said.read_text()  # from outside: torchrun can't


def test_a_killed_torchrun_is_started_again(start):
    run = start("launch.nodes=2", "train.steps=60")
    a, _ = run.node("a"), run.node("b")
    both_at(run, 5)
    (torchrun,) = (
        int(pid) for pid in Path(f"/proc/{a.process.pid}/task/{a.process.pid}/children").read_text().split()
    )
    os.kill(torchrun, signal.SIGKILL)
    assert all_end(run) == {"a": 0, "b": 0}
    assert "torchrun was killed by SIGKILL; torchrun starts again" in a.said.read_text()


def test_workers_do_not_share_torchruns_store(start):
    run = start("launch.nodes=1", "train.steps=400")
    a = run.node("a")
    until(lambda: a.at(1), "a step")
    environment = Path(f"/proc/{a.workers()[0]}/environ").read_bytes().split(b"\0")
    assert b"TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in environment
    assert b"TORCHELASTIC_USE_AGENT_STORE=False" in environment
    a.process.terminate()
    assert all_end(run) == {"a": 75}
