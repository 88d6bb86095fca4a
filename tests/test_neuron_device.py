"""The stand-in for the device neuron: it computes as a CPU does, and raises where the real device couldn't."""

import re
from collections.abc import Callable
from typing import Any

import pytest

from tests.neuron_device.processes import SENDS, on_stand_in
from tests.ranks import RankPool


def said(function: Callable[[], Any]) -> str:
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "done"


def by_one_process() -> dict[str, str]:
    import torch
    import torch_neuronx  # noqa: F401

    def on(values: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device="neuron")

    x, ids, mask = on([[1.0, -2.0], [3.0, 4.0]]), on([1, 0], torch.int64), on([True, False], torch.bool)
    table = on([[1.0], [2.0]])
    cases: dict[str, Callable[[], Any]] = {
        "nonzero": lambda: x.nonzero(),
        "masked_select": lambda: x.masked_select(x > 0),
        "unique": lambda: x.unique(),
        "reading by a mask": lambda: x[mask],
        "writing by a mask": lambda: x.index_put_((mask,), on(0.0)),
        "float64 made": lambda: torch.zeros(3, dtype=torch.float64, device="neuron"),
        "float64 converted to": lambda: x.double(),
        "int64 added": lambda: ids + 1,
        "int64 compared": lambda: ids == 1,
        "int64 summed up to": lambda: on([1, 2], torch.int32).sum(),
        "int64 counted": lambda: torch.arange(3, device="neuron"),
        "another core": lambda: torch.empty(2, device="neuron:1"),
        "another core set": lambda: torch.neuron.set_device(1),
        "a tensor of the host": lambda: x + torch.ones(2, 2),
        "int64 moved": lambda: (ids.cpu().tolist() == [1, 0]) or 1 / 0,
        "int64 as an index": lambda: (x[ids].tolist(), x.gather(1, ids.unsqueeze(1))),
        "int64 looked up": lambda: torch.nn.functional.embedding(ids, table),
        "int64 to int32": lambda: ids.int() + 1,
        "a number of the host": lambda: x * torch.tensor(2.0),
        "its own core": lambda: torch.empty(2, device="neuron:0"),
        "its own core set": lambda: torch.neuron.set_device(torch.device("neuron")),
    }
    return {name: said(case) for name, case in cases.items()}


ONE_PROCESS = {
    "nonzero": "NotImplementedError: .*shape depends on values",
    "masked_select": "NotImplementedError: .*shape depends on values",
    "unique": "NotImplementedError: .*shape depends on values",
    "reading by a mask": "NotImplementedError: .*boolean mask",
    "writing by a mask": "NotImplementedError: .*boolean mask",
    "float64 made": "NotImplementedError: .*no float64",
    "float64 converted to": "NotImplementedError: .*float64",
    "int64 added": "NotImplementedError: .*int64",
    "int64 compared": "NotImplementedError: .*int64",
    "int64 summed up to": "NotImplementedError: .*int64",
    "int64 counted": "NotImplementedError: .*int64",
    "another core": "ValueError: Invalid device id: 1",
    "another core set": "ValueError: Invalid device id: 1",
    "a tensor of the host": "RuntimeError: .*expected all tensors to be on the device neuron",
    "int64 moved": "done",
    "int64 as an index": "done",
    "int64 looked up": "done",
    "int64 to int32": "done",
    "a number of the host": "done",
    "its own core": "done",
    "its own core set": "done",
}


@pytest.fixture(scope="module")
def by_one(run_on_neuron: RankPool) -> dict[str, str]:
    return run_on_neuron(on_stand_in, 1, by_one_process)[0]


@pytest.mark.parametrize("name", ONE_PROCESS)
def test_one_process(by_one: dict[str, str], name: str):
    assert re.match(ONE_PROCESS[name], by_one[name]), by_one[name]


def by_ranks() -> dict[str, str]:
    import torch
    import torch.distributed as dist
    import torch_neuronx  # noqa: F401

    before = said(lambda: torch.zeros(2, device="neuron"))
    dist.init_process_group("cpu:gloo,neuron:neuron")
    rank, size = dist.get_rank(), dist.get_world_size()
    pair = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])][rank // 2]
    host = dist.new_group(backend="gloo")
    x, bad = torch.ones(4, device="neuron"), torch.tensor([1.0, float("inf"), float("nan")], device="neuron")
    out, none = torch.zeros(16, device="neuron"), torch.zeros(0, device="neuron")

    def coalesce() -> None:
        with dist._coalescing_manager(device=torch.device("neuron")):
            dist.all_reduce(torch.ones(1, device="neuron"))

    def send() -> None:
        if rank % 2 == 0:
            dist.send(x, dst=rank + 1)
        else:
            dist.recv(x, src=rank - 1)

    share = torch.finfo(torch.float32).max / size

    def sum_of_bad() -> None:
        total = bad.clone() if rank == 0 else torch.zeros_like(bad)
        dist.all_reduce(total)
        assert total.tolist() == [1.0, share, 0.0], total.tolist()

    def sum_of_all_bad() -> None:
        total = torch.tensor([float("inf"), -float("inf"), 3e38], device="neuron")
        dist.all_reduce(total)
        assert total.isfinite().all(), total.tolist()

    def scatter_of_bad() -> None:
        mine, parts = torch.zeros(1, device="neuron"), torch.full((size,), float("inf"), device="neuron")
        parts = parts if rank == 0 else torch.zeros(size, device="neuron")
        dist.reduce_scatter_tensor(mine, parts)
        assert mine.item() == share
        assert rank > 0 or parts.isinf().all()  # what was brought stays as it was

    def scatter_of_a_bad_list() -> None:
        mine, parts = torch.zeros(1, device="neuron"), torch.full((size, 1), float("inf"), device="neuron")
        dist.reduce_scatter(mine, list(parts.clone()))
        assert mine.isfinite().all(), mine.item()

    def bad_at_one() -> None:
        total = bad.clone()
        dist.reduce(total, dst=0)
        assert rank > 0 or total.isfinite().all(), total.tolist()

    cases: dict[str, Callable[[], Any]] = {
        "all-reduce": lambda: dist.all_reduce(x.clone()),
        "all-gather": lambda: dist.all_gather_into_tensor(out, x),
        "reduce-scatter": lambda: dist.reduce_scatter_tensor(x.clone(), out),
        "all-to-all among 4": lambda: dist.all_to_all_single(torch.empty_like(x), x),
        "all-to-all among 2": lambda: dist.all_to_all_single(torch.empty_like(x), x, group=pair),
        "uneven all-to-all": lambda: dist.all_to_all_single(torch.empty_like(x), x, [2, 1, 1, 0], [2, 1, 1, 0]),
        "all-gather of nothing": lambda: dist.all_gather_into_tensor(none, none),
        "reduce-scatter of nothing": lambda: dist.reduce_scatter_tensor(none, none),
        "uneven all-gather": lambda: dist.all_gather([x[: i + 1] for i in range(size)], x[: rank + 1]),
        "a barrier": lambda: dist.barrier(device_ids=[0]),
        "a barrier of some": lambda: dist.barrier(group=pair, device_ids=[0]),
        "a barrier of the host's": lambda: dist.barrier(group=pair),
        "a group of the host's": lambda: dist.all_reduce(x, group=host),
        "a send": send,
        "a sum of what isn't finite": sum_of_bad,
        "its scattered sum": scatter_of_bad,
        "a sum of none that is finite": sum_of_all_bad,
        "its scattered list": scatter_of_a_bad_list,
        "its sum at one rank": bad_at_one,
        "coalescing": coalesce,  # last: torch goes on collecting
    }
    found = {"before the group": before} | {name: said(case) for name, case in cases.items()}
    dist.barrier()
    return found


RANKS = {
    "before the group": "RuntimeError: .*used before init_process_group",
    "all-reduce": "done",
    "all-gather": "done",
    "reduce-scatter": "done",
    "all-to-all among 4": "done",
    "all-to-all among 2": "NotImplementedError: .*4, 8, 16",
    "uneven all-to-all": "NotImplementedError: .*splits are even",
    "all-gather of nothing": "ValueError: .*without elements",
    "reduce-scatter of nothing": "ValueError: .*without elements",
    "uneven all-gather": "NotImplementedError: .*one shape",
    "a barrier": "done",
    "a barrier of some": "NotImplementedError: barrier",
    "a barrier of the host's": "done",
    "a group of the host's": "RuntimeError: .*[Nn]o backend",
    "coalescing": "(RuntimeError|NotImplementedError): ",
    "a send": "NotImplementedError: .*from rank to rank",
    "a sum of what isn't finite": "done",
    "its scattered sum": "done",
    "a sum of none that is finite": "done",
    "its scattered list": "done",
    "its sum at one rank": "done",
}


@pytest.fixture(scope="module")
def by_four(run_on_neuron: RankPool) -> list[dict[str, str]]:
    return run_on_neuron(on_stand_in, 4, by_ranks)


@pytest.mark.parametrize("name", RANKS)
def test_four_ranks(by_four: list[dict[str, str]], name: str):
    for found in by_four:
        assert re.match(RANKS[name], found[name]), found[name]


def sends() -> str:
    import torch
    import torch.distributed as dist
    import torch_neuronx  # noqa: F401

    dist.init_process_group("cpu:gloo,neuron:neuron")
    x = torch.full((2,), float(dist.get_rank()), device="neuron")
    return said(lambda: dist.send(x, dst=1) if dist.get_rank() == 0 else dist.recv(x, src=0))


def test_a_switch_lets_ranks_send(run_on_neuron: RankPool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(SENDS, "1")
    assert run_on_neuron(on_stand_in, 2, sends) == ["done"] * 2


def what_a_step_compiles() -> tuple[list[int], bool]:
    """The counts after steps with the same shapes and other numbers, then with another shape; and parity."""
    import torch
    from torch_neuronx.counting import compiled

    layer = torch.nn.Linear(4, 4)
    there = torch.nn.Linear(4, 4).to("neuron")
    there.load_state_dict(layer.state_dict())
    counts, losses = [], []
    for step, rows in enumerate([2, 2, 2, 3]):
        x = torch.randn(rows, 4, generator=torch.Generator().manual_seed(step))
        both = []
        for model, device in ((layer, "cpu"), (there, "neuron")):
            loss = model(x.to(device)).square().sum() / (step + 1)
            loss.backward()
            both.append(float(loss))
        losses.append(both)
        counts.append(len(compiled))
    return counts, all(a == b for a, b in losses) and bool((layer.weight.grad == there.weight.grad.cpu()).all())


def test_other_shapes_are_counted_and_other_numbers_are_not(run_on_neuron: RankPool):
    ((first, second, third, other), same) = run_on_neuron(on_stand_in, 1, what_a_step_compiles)[0]
    assert second >= first  # gradients are added up from the second on
    assert third == second < other
    assert same


def what_is_made() -> list[int]:
    import torch
    from torch_neuronx.counting import compiled

    counts = []
    for end in (3, 3, 4):
        torch.arange(end, dtype=torch.int32, device="neuron")
        counts.append(len(compiled))
    return counts


def test_what_is_made_out_of_nothing_is_compiled_too(run_on_neuron: RankPool):
    ((first, second, other),) = run_on_neuron(on_stand_in, 1, what_is_made)
    assert 0 < first == second < other
