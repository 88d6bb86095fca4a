"""The check of all nodes before the first step, and what follows for each rank from what was found."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from trainwright.configs.schema import Recipe
from trainwright.errors import BadNode, BadRequest, RunFailed
from trainwright.trainers.health import clocks, folder, links
from trainwright.trainers.health.device import Answers, memory_fault, products, wrong_products
from trainwright.trainers.health.probes import Outcome, probe_all
from trainwright.trainers.node import node_name
from trainwright.trainers.parallel.ranks import Ranks
from trainwright.trainers.platform.base import Platform, ToolReport
from trainwright.trainers.platform.device_errors import known_in
from trainwright.trainers.run_folder import checkpoint_folder

CHECKS = ("product", "memory", "links", "clock", "disk", "vendor")


class Fault(NamedTuple):
    """What is wrong with a rank: the check that found it, and words that follow "rank 3"."""

    check: str
    said: str


class Found(NamedTuple):
    """What a rank has found out by itself. broken: its device can't even be asked."""

    node: str
    kind: str
    answers: Answers
    free: int
    tools: list[ToolReport]
    broken: str | None


@dataclass(frozen=True)
class Health:
    """What the check has found.

    nodes: by name, their ranks in order. faults: by rank. free_gib: by node, what each rank could have had.
    disk_gib: by node; None where checkpoints go to no disk. gb_s: of the all-reduce; None for one process.
    probes: what was asked of the devices besides, where there was time.
    left_out: the checks that weren't asked for, or that need more than one process.
    refused: what is wrong with the recipe or the surroundings, and no node's fault. failed: what is wrong with
    the whole, so that no node stands out.
    """

    nodes: dict[str, list[int]]
    faults: dict[int, list[Fault]]
    gb_s: float | None
    clocks: dict[str, clocks.Offset]
    free_gib: dict[str, float]
    disk_gib: dict[str, float | None]
    tools: dict[str, list[ToolReport]]
    probes: list[Outcome]
    refused: str | None
    failed: str | None
    left_out: frozenset[str]
    seconds: float

    def bad_nodes(self) -> dict[str, str]:
        """Of each node that failed, what was found on which of its ranks."""
        said = {
            node: "; ".join(f"rank {rank} {fault.said}" for rank in ranks for fault in self.faults[rank])
            for node, ranks in self.nodes.items()
        }
        return {node: text for node, text in said.items() if text}

    def event(self) -> dict[str, object]:
        """What events.jsonl keeps of it."""
        disks = [gib for gib in self.disk_gib.values() if gib is not None]
        return {
            "seconds": round(self.seconds, 3),
            "nodes": len(self.nodes),
            "gb_s": None if self.gb_s is None else round(self.gb_s, 3),
            "clock_skew_s": round(clocks.skew(self.clocks), 6),
            "free_memory_gib": round(min(self.free_gib.values()), 2),
            "free_disk_gib": round(min(disks), 2) if disks else None,
        }


def check_health(recipe: Recipe, ranks: Ranks, platform: Platform) -> Health:
    """Check all nodes, before a run; all ranks call it.

    Raises:
        BadNode: this rank's node isn't fit to train on.
        RunFailed: another one isn't, or no node stands out.
        BadRequest: checkpoints can't be saved where the recipe says.
    """
    health = examine(recipe, ranks, platform)
    require(health, ranks)
    return health


def examine(
    recipe: Recipe,
    ranks: Ranks,
    platform: Platform,
    *,
    thorough: bool = False,
    before: Sequence[ToolReport] = (),
) -> Health:
    """What is the matter with which node; all ranks call it.

    thorough: take the time for the makers' diagnoses and for probes, too. before: what tools have said of this
    rank's node before it was in use.
    """
    started, asked = time.monotonic(), recipe.health
    where = checkpoint_folder(recipe)
    left_out = {"links", "clock"} if ranks.size == 1 else set()
    node = node_name()
    names: list[str] = ranks.gather(node)
    nodes: dict[str, list[int]] = {}
    for rank, name in enumerate(names):
        nodes.setdefault(name, []).append(rank)
    leads = nodes[node][0] == ranks.rank

    found: list[Found] = ranks.gather(_ask_device(platform, node, leads, thorough, before))
    faults: dict[int, list[Fault]] = {rank: [] for rank in range(ranks.size)}
    for rank, one in enumerate(found):
        faults[rank] += [Fault("product", one.broken)] if one.broken else []
        faults[rank] += [Fault("vendor", f"has {said}") for tool in one.tools for said in tool.faults]
    wrong = wrong_products([one.answers for one in found], [one.kind for one in found])
    _add(faults, "product", wrong)

    if asked.memory_gib is None:
        left_out.add("memory")
    else:
        mine = found[ranks.rank]
        free = mine.free // (len(nodes[node]) if platform.shares_memory else 1)
        fault = None if mine.broken else memory_fault(platform, asked.memory_gib, free)
        said = enumerate(ranks.gather(fault))
        _add(faults, "memory", {rank: text for rank, text in said if text})

    gb_s = failed = None
    offsets = dict.fromkeys(nodes, clocks.Offset(0.0, 0.0))
    if ranks.size > 1:
        stamps = ranks.gather(clocks.stamp(ranks))
        offsets = clocks.offsets({name: stamps[its[0]] for name, its in nodes.items()})
        for name, off in clocks.astray(offsets, asked.clock_skew_s).items():
            said_of_it = f"has a clock {off:+.2f} s off, and health.clock_skew_s={asked.clock_skew_s}"
            _add(faults, "clock", {nodes[name][0]: said_of_it})
        if not any(one.broken for one in found):  # a device that can't multiply would hang the others
            gb_s, failed = _sum_up(ranks, platform, list(nodes.values()), asked.bandwidth_gb_s, faults)

    probes: list[Outcome] = []
    if thorough and not any(one.broken for one in found):
        probes = probe_all(recipe, ranks, platform)
        for outcome in probes:
            if outcome.of_the_node:
                failing = f"fails the probe {outcome.probe} ({outcome.found})"
                _add(faults, outcome.probe, dict.fromkeys(outcome.ranks, failing))

    sights = ranks.gather(folder.look(where, ranks, first_on_node=leads))
    unusable, refused = folder.judge(where, sights, nodes, asked.disk_gib)
    _add(faults, "disk", unusable)
    disks = {name: sights[its[0]].free for name, its in nodes.items()}
    return Health(
        nodes=nodes,
        faults=faults,
        gb_s=gb_s,
        clocks=offsets,
        free_gib={name: min(found[rank].free for rank in its) / 2**30 for name, its in nodes.items()},
        disk_gib={name: None if free is None else free / 2**30 for name, free in disks.items()},
        tools={name: [tool for rank in its for tool in found[rank].tools] for name, its in nodes.items()},
        probes=probes,
        refused=refused,
        failed=failed,
        left_out=frozenset(left_out),
        seconds=time.monotonic() - started,
    )


def _ask_device(
    platform: Platform, node: str, leads: bool, thorough: bool, before: Sequence[ToolReport]
) -> Found:
    """What this rank finds without the others. A device that fails must not keep it from telling them."""
    try:
        answers, free = products(platform), platform.free_memory()
        tools = [*before, *platform.tools(first_on_node=leads, thorough=thorough)]
        return Found(node, platform.kind(), answers, free, tools, None)
    except (RuntimeError, OSError) as error:
        known = known_in(str(error), platform.failures)
        if known and not known.of_the_node:  # as where another process has the device
            raise known.error(str(error), worked=False) from error
        said = " ".join(str(error).split())[:200]
        return Found(node, "", {}, 0, [], f"can't compute on its device ({type(error).__name__}: {said})")


def _sum_up(
    ranks: Ranks,
    platform: Platform,
    nodes: Sequence[Sequence[int]],
    floor: float | None,
    faults: dict[int, list[Fault]],
) -> tuple[float, str | None]:
    """GB/s of the all-reduce, and what is wrong with it if no node is to blame."""
    result = links.measure(ranks, platform)
    platform.give_back()
    _add(faults, "links", result.wrong)
    if result.unexplained:
        return result.gb_s, "the ranks' all-reduce gives a wrong sum, and no rank stands out: start again"
    if floor is None or result.gb_s >= floor or result.wrong:
        return result.gb_s, None
    slow = f"reaches {result.gb_s:.3g} GB/s in an all-reduce, and health.bandwidth_gb_s={floor}"
    if len(nodes) == 1:
        _add(faults, "links", {0: slow})
        return result.gb_s, None
    named = links.slow_nodes(ranks, platform, nodes, floor)
    _add(faults, "links", {nodes[node][0]: said for node, said in named.items()})
    if named:
        return result.gb_s, None
    return result.gb_s, (
        f"the network {slow}, and no node stands out: start again when it is less busy, or lower the floor"
    )


def _add(faults: dict[int, list[Fault]], check: str, said: dict[int, str]) -> None:
    for rank, text in said.items():
        faults[rank].append(Fault(check, text))


def require(health: Health, ranks: Ranks) -> None:
    """Raise what follows for this rank from what was found; nothing when all is well.

    Raises:
        BadNode, RunFailed, BadRequest: as `check_health` does.
    """
    if health.refused:
        raise BadRequest(health.refused)
    bad = health.bad_nodes()
    for node, said in bad.items():
        if ranks.rank in health.nodes[node]:
            raise BadNode(f"node {node} failed the health check: {said}; another node has to take its place")
    if bad:
        said = "; ".join(f"node {node} failed the health check: {said}" for node, said in bad.items())
        raise RunFailed(f"{said}; start again when another node has taken its place")
    if health.failed:
        raise RunFailed(f"the health check failed: {health.failed}")
