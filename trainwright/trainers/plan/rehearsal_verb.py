"""`trainwright plan --rehearse`: the ranks that differ, rehearsed side by side, and what is told of them."""

import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from trainwright.trainers.parallel.traffic import by_group, step_traffic
from trainwright.trainers.plan.activations import planned_platform
from trainwright.trainers.plan.layout import GIB, Layout
from trainwright.trainers.plan.memory import memory_of
from trainwright.trainers.plan.refusals import remedies
from trainwright.trainers.plan.rehearsal import Rehearsal, rehearse
from trainwright.trainers.plan.shapes import ranks_that_differ
from trainwright.trainers.plan.wording import differences, gib, spoken, table, words


def rehearse_and_tell(layout: Layout) -> tuple[dict[str, Any], str | None]:
    """Rehearse and print; the numbers, and why it doesn't fit where it doesn't.

    Raises:
        BadRequest: a rank would fail.
    """
    rehearsals = rehearse_layout(layout)
    record = rehearsal_json(layout, rehearsals)
    print("\n".join(rehearsal_tables(record) if sys.stdout.isatty() else rehearsal_lines(record)))
    return record, too_much(layout, rehearsals)


def rehearse_layout(layout: Layout) -> list[Rehearsal]:
    """A rank of each place of the pipeline with the most to keep or to do; several in processes of their own.

    Raises:
        BadRequest: one would fail.
    """
    recipe, each = layout.recipe, layout.ranks // layout.degrees.pp
    calls = [
        (recipe, layout.ranks, pp_rank * each, planned_platform(recipe))
        for pp_rank in ranks_that_differ(recipe, layout.degrees)
    ]
    workers = min(len(calls), os.cpu_count() or 1)
    if workers == 1:
        return [rehearse(*call) for call in calls]
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        return [told.result() for told in [pool.submit(rehearse, *call) for call in calls]]


def highest(rehearsals: Sequence[Rehearsal]) -> Rehearsal:
    """The one that holds the most."""
    return max(rehearsals, key=lambda one: one.memory.total)


def too_much(layout: Layout, rehearsals: Sequence[Rehearsal]) -> str | None:
    """The sentence on a rank that doesn't fit on its device, with what would do; None where all fit."""
    worst = highest(rehearsals)
    if layout.room is None or worst.memory.total <= layout.room:
        return None
    kinds = sorted(worst.memory._asdict().items(), key=lambda kind: -kind[1])[:2]
    most = " and ".join(f"{size / GIB:.1f} GiB for {kind}" for kind, size in kinds)
    return (
        f"rank {worst.rank} of {worst.world} would hold {worst.memory.total / GIB:.1f} GiB and has "
        f"{layout.room / GIB:.1f}, {most}: {remedies(layout, worst.memory.total / layout.memory[1].total)}"
    )


def rehearsal_tables(record: dict[str, Any]) -> Iterator[str]:
    """What is printed in a terminal."""
    ranks = record["ranks"]
    took = spoken(sum(one["seconds"] for one in ranks))
    yield f"rehearsed in {took}, on {record['platform']}: the most that each rank holds"
    head = ("rank", *ranks[0]["memory"], "beside arithmetic")
    rows = [
        (str(one["rank"]), *map(gib, one["memory"].values()), f"{one['memory_ratio']:.3f}") for one in ranks
    ]
    yield from table(head, rows)
    worst = max(ranks, key=lambda one: one["memory"]["total"])
    yield f"what rank {worst['rank']} sends in a step"
    sums = [
        (sent["axis"], sent["kind"], f"{sent['calls']:,}", f"{sent['bytes'] / 1e6:,.1f} MB")
        for sent in worst["collectives"]
    ]
    yield from table(("axis", "collective", "calls", "bytes"), sums)
    yield from list(differences(record)) or ["as by arithmetic"]


def agrees(layout: Layout, told: Rehearsal) -> bool:
    """Whether the formulas have the collectives that were rehearsed."""
    degrees, pp_rank = layout.degrees, told.rank * layout.degrees.pp // told.world
    return told.collectives == by_group(step_traffic(layout.recipe, degrees, pp_rank=pp_rank), degrees)


def memory_ratio(layout: Layout, told: Rehearsal) -> float:
    """The rehearsed memory over that of the formulas."""
    pp_rank = told.rank * layout.degrees.pp // told.world
    return told.memory.total / memory_of(layout.recipe, layout.degrees, pp_rank).total


def rehearsal_lines(record: dict[str, Any]) -> Iterator[str]:
    """What is printed where there is no terminal."""
    for one in record["ranks"]:
        beside = {key: one[key] for key in ("memory_ratio", "as_by_arithmetic")}
        yield f"plan=rehearsal rank={one['rank']} {words(seconds=one['seconds'], **one['memory'], **beside)}"
        for moment, memory in one["by_moment"].items():
            yield f"plan=rehearsal rank={one['rank']} {words(moment=moment, **memory)}"
        for sent in one["collectives"]:
            yield f"plan=rehearsal rank={one['rank']} {words(**sent)}"
    for sentence in differences(record):
        yield words(plan="rehearsal", differs=sentence)


def rehearsal_json(layout: Layout, rehearsals: Sequence[Rehearsal]) -> dict[str, Any]:
    """The rehearsal's numbers."""
    return {
        "platform": planned_platform(layout.recipe),
        "ranks": [
            {
                "rank": one.rank,
                "seconds": one.seconds,
                "micro_batches": one.micro_batches[0],
                "micro_batches_rehearsed": one.micro_batches[1],
                "memory": {"total": one.memory.total, **one.memory._asdict()},
                "by_moment": {
                    moment: {"total": memory.total, **memory._asdict()}
                    for moment, memory in one.by_moment.items()
                },
                "collectives": [
                    {"axis": axis, "kind": kind, "calls": calls, "bytes": sent}
                    for (axis, kind), (calls, sent) in one.collectives.items()
                ],
                "as_by_arithmetic": agrees(layout, one),
                "memory_ratio": memory_ratio(layout, one),
            }
            for one in rehearsals
        ],
    }
