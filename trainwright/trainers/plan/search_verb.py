"""`trainwright plan search`: the layouts that a cluster can run, the fastest first, and why not the others."""

import json
import sys
from collections.abc import Iterator
from typing import Any

from trainwright.configs.planned import planned_ranks
from trainwright.configs.schema import Recipe
from trainwright.errors import BadRequest
from trainwright.trainers.plan.files import write
from trainwright.trainers.plan.layout import GIB, Layout
from trainwright.trainers.plan.search import Found, Refused, search, words_of
from trainwright.trainers.plan.wording import percent, spoken, table, words

SHOWN = 10
HEAD = (
    "",
    "tp",
    "pp",
    "schedule",
    "replicas",
    "shards",
    "zero",
    "micro",
    "checkpointing",
    "GiB",
    "step",
    "MFU",
    "limit",
)


def plan_search(recipe: Recipe) -> None:
    """Print the fastest layouts and the reasons of the others; write all into `plan_search.json`.

    Raises:
        BadRequest: none fits, the cluster isn't described, or the folder can't be written to.
    """
    found = search(recipe, planned_ranks(recipe))
    print("\n".join(tables(found) if sys.stdout.isatty() else lines(found)))
    text = json.dumps(as_json(found), indent=1) + "\n"
    print(f"plan={write(recipe.plan.dir, {'plan_search.json': text}) / 'plan_search.json'}")
    if not found.fit:
        _, count, sentence = found.reasons[0]
        raise BadRequest(
            f"none of {len(found.refused):,} layouts can be; of {count:,} the reason is like: {sentence}"
        )


def shown(found: Found) -> list[tuple[int, Layout]]:
    """The fastest layouts with their places, and the recipe's own."""
    first = list(enumerate(found.fit[:SHOWN]))
    return first if isinstance(found.own, Refused) or found.own[0] < SHOWN else [*first, found.own]


def row(place: int, layout: Layout) -> tuple[str, ...]:
    """A line of the table."""
    recipe, degrees = layout.recipe, layout.degrees
    return (
        str(place + 1),
        *(str(degree) for degree in (degrees.tp, degrees.pp)),
        recipe.parallel.pp_schedule if degrees.pp > 1 else "",
        *(str(degree) for degree in (degrees.dp_replicate, degrees.dp_shard)),
        str(recipe.parallel.zero),
        str(recipe.train.micro_batch_size),
        recipe.train.activation_checkpointing,
        f"{layout.memory[1].total / GIB:.1f}",
        spoken(layout.time.total),
        percent(layout.mfu),
        layout.binds,
    )


def tables(found: Found) -> Iterator[str]:
    """What is printed in a terminal."""
    yield f"{len(found.fit):,} layouts fit, {len(found.refused):,} can't be"
    yield from table(HEAD, [row(*one) for one in shown(found)])
    if isinstance(found.own, Refused):
        yield f"the recipe's own layout can't be: {found.own.why}"
    else:
        place, layout = found.own
        slower = layout.time.total / found.fit[0].time.total - 1
        yield f"the recipe's own layout is number {place + 1}, {percent(slower)} slower than the first"
    reasons = [(f"{count:,}", sentence) for _, count, sentence in found.reasons]
    yield from table(("layouts", "can't be, as"), reasons)


def lines(found: Found) -> Iterator[str]:
    """What is printed where there is no terminal."""
    yield words(plan="search", fit=len(found.fit), refused=len(found.refused))
    for place, layout in shown(found):
        yield words(plan="layout", **record(place, layout))
    own = {"reason": found.own.why} if isinstance(found.own, Refused) else record(*found.own)
    yield words(plan="own", **own)
    for _, count, sentence in found.reasons:
        yield words(plan="refused", count=count, reason=sentence)


def record(place: int, layout: Layout) -> dict[str, Any]:
    """A layout's numbers."""
    return {
        "place": place + 1,
        **layout.degrees._asdict(),
        "zero": layout.recipe.parallel.zero,
        "pp_schedule": layout.recipe.parallel.pp_schedule if layout.degrees.pp > 1 else None,
        "micro_batch_size": layout.recipe.train.micro_batch_size,
        "activation_checkpointing": layout.recipe.train.activation_checkpointing,
        "memory": layout.memory[1].total,
        "step_s": layout.time.total,
        "tokens_per_s": layout.tokens_per_s,
        "mfu": layout.mfu,
        "usd_per_billion_tokens": layout.usd_per_billion_tokens,
        "binds": layout.binds,
        "words": words_of(layout.recipe),
    }


def as_json(found: Found) -> dict[str, Any]:
    """All layouts: those that fit with their numbers, the others with their reason."""
    return {
        "fit": [record(place, layout) for place, layout in enumerate(found.fit)],
        "own": {"why": found.own.why} if isinstance(found.own, Refused) else {"place": found.own[0] + 1},
        "reasons": [{"kind": kind, "count": count, "example": one} for kind, count, one in found.reasons],
        "refused": [{"layout": one.words, "why": one.why} for one in found.refused],
    }
