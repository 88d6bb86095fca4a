"""Whether an all-reduce among the ranks adds up and how fast it is; which node is to blame where it isn't."""

import time
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from trainwright.trainers.parallel.ranks import Ranks
from trainwright.trainers.platform.base import Platform

ROUNDS = 5
SLOT = 1024  # numbers of each rank where each has a place of its own
VALUES, SHIFTS = 61, 64  # sums of them are exact in fp32 with 100,000 ranks, in whatever order


class AllReduce(NamedTuple):
    """How fast the sum of all ranks' numbers is, and the ranks that are to blame for a wrong one.

    unexplained: the sum is wrong and no rank stands out.
    """

    gb_s: float
    wrong: dict[int, str]
    unexplained: bool


def brought(rank: int, count: int, device: torch.device) -> Tensor:
    """The numbers that a rank brings to a sum, which is then known."""
    return (torch.arange(count, dtype=torch.int32, device=device) % VALUES + rank % SHIFTS).float()


def measure(ranks: Ranks, platform: Platform) -> AllReduce:
    """Time all-reduces of known numbers among all ranks, and check their sums."""
    count = platform.buffer_bytes // 4
    mine = brought(ranks.rank, count, platform.device)
    shifts = sum(rank % SHIFTS for rank in range(ranks.size))
    numbers = torch.arange(count, dtype=torch.int32, device=platform.device)
    right = (numbers % VALUES * ranks.size + shifts).float()
    seconds, wrong = [], False
    for _ in range(ROUNDS + 1):
        buffer = mine.clone()
        _together(ranks, platform)
        started = time.perf_counter()
        ranks.sum(buffer)
        platform.synchronize()
        seconds.append(time.perf_counter() - started)
        wrong |= not torch.equal(buffer, right)
    # The first makes connections. A round has taken as long as on its slowest rank.
    found = ranks.gather((seconds[1:], wrong))
    slowest = [max(times) for times in zip(*(seconds for seconds, _ in found), strict=True)]
    gb_s = platform.buffer_bytes / median(slowest) / 1e9
    got_wrong = [rank for rank, (_, wrong) in enumerate(found) if wrong]
    if len(got_wrong) < ranks.size:
        return AllReduce(gb_s, dict.fromkeys(got_wrong, "gets a wrong sum from an all-reduce"), False)
    bringing = _bringing_wrong(ranks, platform)
    said = dict.fromkeys(bringing, "brings wrong numbers to an all-reduce")
    return AllReduce(gb_s, said, unexplained=not bringing)


def _together(ranks: Ranks, platform: Platform) -> None:
    platform.synchronize()
    ranks.sum(torch.zeros(1))


def _bringing_wrong(ranks: Ranks, platform: Platform) -> list[int]:
    """The ranks whose numbers arrive wrong in a sum where each has a place of its own."""
    slots = torch.zeros(ranks.size, SLOT, device=platform.device)
    slots[ranks.rank] = brought(ranks.rank, SLOT, platform.device)
    ranks.sum(slots)
    cpu = torch.device("cpu")
    wrong = [rank for rank, slot in enumerate(slots.cpu()) if not torch.equal(slot, brought(rank, SLOT, cpu))]
    seen: list[list[int]] = ranks.gather(wrong)
    return [rank for rank in range(ranks.size) if 2 * sum(rank in one for one in seen) > ranks.size]


def slow_nodes(
    ranks: Ranks, platform: Platform, nodes: Sequence[Sequence[int]], floor: float
) -> dict[int, str]:
    """Of nodes whose all-reduce is slow those whose links to both neighbours are, if some are quicker.

    nodes: the ranks of each. Each node sends to the next one in a ring, by turns, so that a node sends or
    receives and never both, and what a receiver measures is one link.
    """
    into = _links(ranks, platform, nodes)
    both = [max(speed, after) for speed, after in zip(into, into[1:] + into[:1], strict=True)]
    best = max(into)
    slow = [node for node, speed in enumerate(both) if speed < max(floor, best / 2)]
    if len(slow) == len(nodes):
        return {}
    return {
        node: f"sends and receives at most {both[node]:.3g} GB/s where other nodes reach {best:.3g}, and "
        f"health.bandwidth_gb_s={floor}"
        for node in slow
    }


def _links(ranks: Ranks, platform: Platform, nodes: Sequence[Sequence[int]]) -> list[float]:
    """GB/s from each node's predecessor in the ring to it, over as many pairs of ranks as all nodes have."""
    last, width = len(nodes) - 1, min(map(len, nodes))
    here = next(number for number, node in enumerate(nodes) if ranks.rank in node)
    place = list(nodes[here]).index(ranks.rank)
    buffer = torch.zeros(platform.buffer_bytes // 4, device=platform.device)
    speed = 0.0
    for turn in range(3):
        _together(ranks, platform)
        if place >= width:
            continue
        if _turn(here, last) == turn:
            for _ in range(ROUNDS):
                dist.send(buffer, dst=nodes[(here + 1) % len(nodes)][place])
        elif _turn((here - 1) % len(nodes), last) == turn:
            for number in range(ROUNDS):
                started = time.perf_counter()
                dist.recv(buffer, src=nodes[here - 1][place])
                platform.synchronize()
                if number > 0:  # the first makes the connection
                    speed = max(speed, platform.buffer_bytes / (time.perf_counter() - started) / 1e9)
    found = ranks.gather(speed)
    return [sum(found[rank] for rank in node[:width]) for node in nodes]


def _turn(sender: int, last: int) -> int:
    """When a node sends to the next: neighbours at different times, which an odd ring needs three of."""
    return 2 if sender == last and last % 2 == 0 else sender % 2
