"""`trainwright plan`: the memory, the traffic and the time of a step of a recipe on a cluster."""

import json
import sys
from collections.abc import Iterator
from typing import Any

from trainwright.configs.degrees import resolve_degrees
from trainwright.configs.planned import planned_ranks
from trainwright.configs.schema import Recipe
from trainwright.errors import BadRequest
from trainwright.trainers.plan.files import write
from trainwright.trainers.plan.layout import PARTS, Layout
from trainwright.trainers.plan.layout_page import page
from trainwright.trainers.plan.refusals import with_remedies
from trainwright.trainers.plan.wording import gib, percent, spoken, table, words


def plan_layout(recipe: Recipe) -> None:
    """Print the plan, and write `plan.html` and `plan.json` into `plan.dir`.

    Raises:
        BadRequest: the memory isn't enough, a rank would fail, or the folder can't be written to.
    """
    layout = Layout(recipe, resolve_degrees(recipe.parallel, planned_ranks(recipe)))
    print("\n".join(tables(layout) if sys.stdout.isatty() else lines(layout)), flush=True)
    record = as_json(layout)
    said = with_remedies(layout) if layout.fits is False else None
    if recipe.plan.rehearse:
        from trainwright.trainers.plan import rehearsal_verb  # builds models, which nothing else here does

        record["rehearsal"], refused = rehearsal_verb.rehearse_and_tell(layout)
        said = refused or said
    texts = {
        "plan.html": page(layout, record.get("rehearsal")),
        "plan.json": json.dumps(record, indent=2) + "\n",
    }
    print(f"plan={write(recipe.plan.dir, texts) / 'plan.html'}")
    if said:
        raise BadRequest(said)


def lines(layout: Layout) -> Iterator[str]:
    """What is printed where there is no terminal: `key=value` lines."""
    record = as_json(layout)
    for key in ("layout", "model", "memory", "time"):
        if record[key]:
            yield f"plan={key} {words(**record[key])}"
    for one in record["traffic"]:
        yield f"plan=traffic {words(**one)}"


def tables(layout: Layout) -> Iterator[str]:
    """What is printed in a terminal."""
    degrees, cluster = layout.degrees, layout.recipe.cluster
    named = (
        f" on {layout.ranks // cluster.ranks_per_node:,} {cluster.instance}" if cluster.ranks_per_node else ""
    )
    yield (
        f"{layout.parameters:,} parameters, {layout.flops_per_token:.3g} operations a token; {layout.ranks:,} "
        f"ranks{named}: " + " x ".join(f"{axis} {degree}" for axis, degree in degrees._asdict().items())
    )
    rank, memory = layout.memory
    room = "" if layout.room is None else f" of {gib(layout.room)}{'' if layout.fits else ': too much'}"
    where = f", stage {rank} of the pipeline" if degrees.pp > 1 else ""
    yield f"memory of a rank{where}: {gib(memory.total)}{room}"
    yield from table(("kind", "size"), [(kind, gib(size)) for kind, size in memory._asdict().items()])
    if not layout.timed:
        return
    yield f"a step: {spoken(layout.time.total)}, {layout.tokens_per_s:,.0f} tokens/s, MFU {percent(layout.mfu)}"
    rows = [
        (PARTS[part], spoken(took), percent(took / layout.time.total))
        for part, took in layout.time._asdict().items()
    ]
    yield from table(("what", "seconds", "share"), rows)
    yield f"what limits it: {layout.binds}"
    cost = layout.usd_per_billion_tokens
    if cost is not None:
        yield f"{cost:,.0f} USD for 10^9 tokens at {cluster.usd_per_hour} an hour and node ({cluster.priced})"
    head = ("axis", "collective", "what", "calls", "bytes", "sent", "link", "seconds")
    yield from table(head, [traffic_row(layout, number) for number in range(len(layout.traffic))])


def traffic_row(layout: Layout, number: int) -> tuple[str, ...]:
    """A line of the table of what is sent."""
    one = layout.traffic[number]
    sizes = (f"{one.calls:,}", f"{one.bytes / 1e6:,.1f} MB", f"{layout.crosses(one) / 1e6:,.1f} MB")
    return one.axis, one.kind, one.what, *sizes, layout.link(one.axis), spoken(layout.takes(one))


def as_json(layout: Layout) -> dict[str, Any]:
    """The plan's numbers; `time` is empty where the cluster's pace isn't known."""
    recipe, cluster, (rank, memory) = layout.recipe, layout.recipe.cluster, layout.memory
    time: dict[str, Any] = {}
    if layout.timed:
        time = {
            "step_s": layout.time.total,
            **{f"{part}_s": took for part, took in layout.time._asdict().items()},
            "tokens_per_s": layout.tokens_per_s,
            "mfu": layout.mfu,
            "usd_per_billion_tokens": layout.usd_per_billion_tokens,
            "binds": layout.binds,
        }
    traffic = []
    for one in layout.traffic:
        sent = one._asdict() | {"crossing": layout.crosses(one)}
        traffic.append(
            sent | ({"link": layout.link(one.axis), "seconds": layout.takes(one)} if layout.timed else {})
        )
    return {
        "layout": {
            "instance": cluster.instance,
            "ranks": layout.ranks,
            **layout.degrees._asdict(),
            "zero": recipe.parallel.zero,
            "micro_batch_size": recipe.train.micro_batch_size,
            "activation_checkpointing": recipe.train.activation_checkpointing,
            "precision": recipe.precision.mode,
        },
        "model": {
            "parameters": layout.parameters,
            "flops_per_token": layout.flops_per_token,
            "tokens_per_step": layout.tokens_per_step,
        },
        "memory": {
            "pp_rank": rank,
            "total": memory.total,
            **memory._asdict(),
            "room": None if layout.room is None else int(layout.room),
            "fits": layout.fits,
        },
        "time": time,
        "traffic": traffic,
    }
