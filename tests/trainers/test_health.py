"""The health check: every failure, brought about on one rank, names that rank, and its node alone gets 77."""

import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trainwright.cli import main
from trainwright.configs.compose import load_recipe
from trainwright.errors import Preempted, TrainwrightError
from trainwright.trainers.checkpoint.place import place
from trainwright.trainers.health import check, clocks, folder, links
from trainwright.trainers.health.check import check_health
from trainwright.trainers.health.clocks import Offset, astray
from trainwright.trainers.health.device import wrong_products
from trainwright.trainers.health.probes import PROBES
from trainwright.trainers.parallel.ranks import Ranks, open_ranks
from trainwright.trainers.platform.base import ToolReport
from trainwright.trainers.platform.cpu import Cpu
from trainwright.trainers.platform.neuron_errors import NEURON_ERRORS

Patch = pytest.MonkeyPatch
SMALL = 1 << 12  # elements: the sums that are checked are larger


def other(patch: Patch, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    """Put in place of `owner.name` what `make` makes of it."""
    patch.setattr(owner, name, make(getattr(owner, name)))


def flip_a_bit(patch: Patch) -> None:
    def flipped(self: Cpu, matrix: torch.Tensor) -> torch.Tensor:
        product = matrix @ matrix
        product.view(torch.int16)[3, 5] ^= 1
        return product

    patch.setattr(Cpu, "product", flipped)


def flip_a_bit_once(patch: Patch) -> None:
    times = iter(range(100))

    def flipped(self: Cpu, matrix: torch.Tensor) -> torch.Tensor:
        product = matrix @ matrix
        product.view(torch.int16)[3, 5] ^= int(next(times) == 1)
        return product

    patch.setattr(Cpu, "product", flipped)


def break_the_device(patch: Patch) -> None:
    def broken(self: Cpu, matrix: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("CUDA error: an illegal memory access\nwas encountered")

    patch.setattr(Cpu, "product", broken)


def get_a_wrong_sum(patch: Patch) -> None:
    def make(right: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def wrong(self: Ranks, numbers: torch.Tensor) -> torch.Tensor:
            right(self, numbers)
            if numbers.numel() > SMALL:
                numbers[7] += 1
            return numbers

        return wrong

    other(patch, Ranks, "sum", make)


def bring_wrong_numbers(patch: Patch) -> None:
    other(patch, links, "brought", lambda right: lambda *args: right(*args) + 1)


def slow_links(patch: Patch) -> None:
    def make(quick: Callable[..., Any]) -> Callable[..., Any]:
        def slow(*args: Any, **kwargs: Any) -> Any:
            if max(arg.numel() for arg in args if isinstance(arg, torch.Tensor)) > SMALL:
                time.sleep(0.3)
            return quick(*args, **kwargs)

        return slow

    other(patch, Ranks, "sum", make)
    other(patch, links.dist, "send", make)
    other(patch, links.dist, "recv", make)


def shift_the_clock(patch: Patch) -> None:
    patch.setattr(clocks, "wall_clock", lambda: time.time() + 60)


def hide_the_folder(patch: Patch) -> None:
    def hidden(file: object) -> str:
        raise FileNotFoundError(2, "No such file or directory")

    patch.setattr(folder, "_read", hidden)
    patch.setattr(folder, "SIGHT", 0.2)


def forbid_to_write(patch: Patch) -> None:
    def forbidden(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    patch.setattr(folder.Place, "write_text", forbidden)


def fill_the_disk(patch: Patch) -> None:
    full = shutil._ntuple_diskusage(2**40, 2**40 - 2**28, 2**28)  # type: ignore[attr-defined]
    patch.setattr(folder.shutil, "disk_usage", lambda path: full)


def take_the_memory(patch: Patch) -> None:
    patch.setattr(Cpu, "free_memory", lambda self: 2**20)


def forget_a_bit(patch: Patch) -> None:
    def make(right: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def forgetful(self: torch.Tensor, value: int) -> torch.Tensor:
            right(self, value)[5] ^= 1
            return self

        return forgetful

    other(patch, torch.Tensor, "fill_", make)


def refuse_the_memory(patch: Patch) -> None:
    def refused(self: Cpu, size: int) -> torch.Tensor:
        raise torch.OutOfMemoryError("out of memory")

    patch.setattr(Cpu, "allocate", refused)


def find_errors(patch: Patch) -> None:
    reports = [ToolReport("nvidia-smi", ("3 uncorrected ECC errors",)), ToolReport("dcgmi", skipped="absent")]
    patch.setattr(Cpu, "tools", lambda *args, **kwargs: reports)


def checked(
    words: list[str], spoil: Callable[[Patch], None] | None, spoilt: int = 1, nodes: str = "each"
) -> Any:
    """On every rank: the status and the sentence that it ends with; nothing of it where all is well."""
    platform = Cpu()
    recipe = load_recipe(words)
    with open_ranks(recipe.parallel, platform) as ranks, Patch.context() as patch:
        patch.setattr(check, "node_name", lambda: f"node{ranks.rank if nodes == 'each' else 0}")
        if spoil and (spoilt == ranks.rank or spoilt < 0):
            spoil(patch)
        if spoil:
            patch.setattr(links, "ROUNDS", 2)
        try:
            check_health(recipe, ranks, platform)
        except TrainwrightError as error:
            return error.status, str(error)
        return 0, ""


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    return [f"run.dir={tmp_path / 'runs'}", "run.name=sound", "platform=cpu"]


def test_all_is_well(run_on_ranks, words: list[str], tmp_path: Path):
    assert run_on_ranks(checked, 4, [*words, "health.memory_gib=0.01"], None) == [(0, "")] * 4
    assert not list(tmp_path.iterdir())


FAILURES = [
    (flip_a_bit, [], "computes a product of other bits in fp32, against 2 ranks that agree"),
    (flip_a_bit_once, [], "computes another product each time in fp32"),
    (
        break_the_device,
        [],
        r"can't compute on its device (RuntimeError: CUDA error: an illegal memory access was",
    ),
    (get_a_wrong_sum, [], "gets a wrong sum from an all-reduce"),
    (bring_wrong_numbers, [], "brings wrong numbers to an all-reduce"),
    (slow_links, ["health.bandwidth_gb_s=0.03"], "sends and receives at most 0.0"),
    (shift_the_clock, [], "has a clock +60.00 s off, and health.clock_skew_s=5.0"),
    (hide_the_folder, [], "can't read what rank 0 wrote to "),
    (forbid_to_write, [], "can't write to the checkpoints' folder "),
    (fill_the_disk, [], "has 0.25 GiB of free disk at "),
    (take_the_memory, ["health.memory_gib=0.01"], "has 0.0 GiB of free memory, and health.memory_gib=0.01"),
    (refuse_the_memory, ["health.memory_gib=0.01"], "can't have 0.01 GiB of memory (OutOfMemoryError: out of"),
    (forget_a_bit, ["health.memory_gib=0.01"], "reads other bits from its memory than it wrote, in 0.01 GiB"),
    (find_errors, [], "has 3 uncorrected ECC errors"),
]


@pytest.mark.parametrize(("spoil", "more", "said"), FAILURES, ids=[spoil.__name__ for spoil, *_ in FAILURES])
def test_a_bad_node_is_named_and_gets_77(
    run_on_ranks, words: list[str], tmp_path: Path, spoil: Callable[[Patch], None], more: list[str], said: str
):
    found = run_on_ranks(checked, 3, [*words, *more], spoil)
    assert [status for status, _ in found] == [1, 77, 1]
    for _, sentence in found:
        assert f"node node1 failed the health check: rank 1 {said}" in sentence
        assert "rank 0 " not in sentence.replace("what rank 0 wrote", "")
    assert found[1][1].endswith("; another node has to take its place")
    assert found[2][1].endswith("; start again when another node has taken its place")
    assert not list(tmp_path.iterdir())


def test_all_ranks_of_a_bad_node_get_77(run_on_ranks, words: list[str]):
    found = run_on_ranks(checked, 3, words, flip_a_bit, 1, "one")
    assert [status for status, _ in found] == [77] * 3
    assert "node node0 failed the health check: rank 1 computes" in found[2][1]


def test_a_floor_that_the_only_node_misses_is_its_fault(run_on_ranks, words: list[str]):
    found = run_on_ranks(checked, 2, [*words, "health.bandwidth_gb_s=1e6"], None, 1, "one")
    assert [status for status, _ in found] == [77] * 2
    assert "GB/s in an all-reduce, and health.bandwidth_gb_s=1000000.0" in found[0][1]


def test_a_floor_that_no_node_reaches_is_nobodys(run_on_ranks, words: list[str]):
    found = run_on_ranks(checked, 2, [*words, "health.bandwidth_gb_s=1e6"], None)
    assert [status for status, _ in found] == [1, 1]
    assert "no node stands out" in found[0][1]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (forbid_to_write, r"no node can write to \S+/runs/sound/checkpoints \(Permission denied\): change "),
        (
            fill_the_disk,
            "every node has 0.25 GiB of free disk at .*: make room, or name another checkpoint.dir",
        ),
    ],
)
def test_what_fails_on_every_node_is_a_bad_request(run_on_ranks, words: list[str], spoil, said: str):
    for status, sentence in run_on_ranks(checked, 2, words, spoil, -1):
        assert status == 2
        assert re.search(said, sentence), sentence


def test_a_folder_that_is_not_shared_is_a_bad_request(run_on_ranks, words: list[str]):
    # A file system in memory is each process's own.
    for status, sentence in run_on_ranks(checked, 2, [*words, "checkpoint.dir=memory://bucket"], None):
        assert status == 2
        assert "the nodes don't share memory:///bucket/sound, where checkpoints go" in sentence


def test_a_url_that_all_share_is_fine(run_on_ranks, words: list[str], tmp_path: Path):
    found = run_on_ranks(checked, 2, [*words, f"checkpoint.dir=file://{tmp_path}/all"], None)
    assert found == [(0, "")] * 2
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_there_stays_with_what_is_in_it(words: list[str], tmp_path: Path):
    inside = tmp_path / "runs" / "sound" / "checkpoints"
    inside.mkdir(parents=True)
    assert main(["health", *words]) == 0
    assert not list(inside.iterdir())
    assert inside.is_dir()


def answers(*words: str) -> dict[str, tuple[str, ...]]:
    return {"fp32": words, "bf16": words}


@pytest.mark.parametrize(
    ("its", "kinds", "wrong"),
    [
        (["a", "a", "a"], "xxx", []),
        (["a", "b", "a"], "xxx", [1]),
        (["a", "b", "a", "b"], "xyxy", []),  # devices of two kinds
        (["a", "b"], "xx", [0, 1]),  # one of them is wrong, and nobody knows which
        (["a", "b", "c", "a", "a"], "xxxxx", [1, 2]),
    ],
)
def test_the_majority_of_a_kind_is_right(its: list[str], kinds: str, wrong: list[int]):
    assert sorted(wrong_products([answers(one, one) for one in its], list(kinds))) == wrong


def test_a_device_that_differs_from_itself_has_no_vote():
    found = wrong_products([answers("a", "b"), answers("b", "b")], ["x", "x"])
    assert found == {0: "computes another product each time in fp32 and bf16"}


@pytest.mark.parametrize(
    ("ahead", "off"),
    [
        ({"a": 0.0, "b": 0.01, "c": -2.0}, []),
        ({"a": 0.0, "b": 0.0, "c": 60.0}, ["c"]),
        ({"a": 0.0, "b": 60.0, "c": 60.0}, ["a"]),
        ({"a": 0.0, "b": 60.0}, ["a", "b"]),
        ({"a": 0.0, "b": -4.0, "c": 0.1, "d": 4.0}, ["b"]),  # each within 5 s of the median
        ({"a": 0.0, "b": 90.0, "c": -60.0, "d": 0.0, "e": 0.0}, ["b", "c"]),
    ],
)
def test_the_clocks_that_are_off(ahead: dict[str, float], off: list[str]):
    assert sorted(astray({node: Offset(s, 0.001) for node, s in ahead.items()}, 5.0)) == off


def test_a_clock_that_may_be_right_is_not_blamed():
    assert not astray({"a": Offset(0.0, 0.0), "b": Offset(6.0, 2.0)}, 5.0)


def test_the_verb_prints_a_line_a_node(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["health", *words, "health.memory_gib=0.01"]) == 0
    line, *probes, last = capsys.readouterr().out.splitlines()
    assert [text.split()[0] for text in probes] == [f"probe={probe.name}" for probe in PROBES]
    said = dict(pair.split("=") for pair in f"{line} {last}".split())
    wanted = {"ranks": "0", "product": "ok", "links": "none", "memory": "ok", "clock": "none", "disk": "ok"}
    assert wanted.items() <= said.items()
    assert said["vendor"] == "none"
    assert said["health"] == "ok"
    assert float(said["disk_gib"]) > 0
    assert not list(tmp_path.iterdir())


def test_a_refused_folder_shows_as_its_disk(words: list[str], capsys: pytest.CaptureFixture[str]):
    assert main(["health", *words, "health.disk_gib=1e9"]) == 2
    assert " disk=failed " in capsys.readouterr().out


def test_the_verb_shows_what_failed_before_it_fails(
    words: list[str], monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
):
    find_errors(monkeypatch)
    assert main(["health", *words]) == 77
    printed = capsys.readouterr()
    assert "vendor=failed" in printed.out
    assert "dcgmi: skipped (absent)" in printed.out
    assert "health=failed" in printed.out
    assert "failed the health check: rank 0 has 3 uncorrected ECC errors; another node" in printed.err


class ClientsError(Exception):
    """An error of a client library under fsspec, which is no OSError."""


@pytest.mark.parametrize("error", [PermissionError(13, "no"), ClientsError("no"), ValueError("no")])
def test_what_a_file_system_raises_is_said(tmp_path: Path, monkeypatch: Patch, error: Exception):
    monkeypatch.setattr(folder.Place, "write_text", raising(error))
    assert folder.look(place(tmp_path), Ranks(), first_on_node=True).unwritten == "no"


@pytest.mark.parametrize("error", [Preempted("SIGTERM came"), TypeError("a bug")])
@pytest.mark.parametrize("name", ["write_text", "read_text"])
def test_what_no_file_system_raises_blames_no_node(
    tmp_path: Path, monkeypatch: Patch, error: Exception, name: str
):
    monkeypatch.setattr(folder.Place, name, raising(error))
    with pytest.raises(type(error)):
        folder.look(place(tmp_path), Ranks(), first_on_node=True)


def raising(error: Exception) -> Callable[..., None]:
    def act(*_: object) -> None:
        raise error

    return act


def test_a_device_that_another_process_has_is_no_fault_of_the_node(
    words: list[str], monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
):
    def taken(self: Cpu, matrix: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("NeuronCore(s) not available - Requested:nc1-nc1 Available:0")

    monkeypatch.setattr(Cpu, "failures", NEURON_ERRORS)
    monkeypatch.setattr(Cpu, "product", taken)
    assert main(["health", *words]) == 1
    assert "another process has the cores (NRT_LOAD_NOT_ENOUGH_NC, 9): end it" in capsys.readouterr().err
