"""Why a layout can't be, in a sentence, and what would do instead."""

from collections.abc import Iterator
from dataclasses import replace

from trainwright.configs.check import check_layout
from trainwright.configs.degrees import resolve_degrees
from trainwright.configs.schema import Recipe
from trainwright.trainers.plan.layout import GIB, Layout

NAMED = 3  # remedies
NOT_TIMED = (
    "nothing says how fast a rank is: name cluster=trn1.32xlarge or another kind of machine, and a precision "
    "that computes in bf16"
)


def too_large(layout: Layout) -> str:
    """The sentence on a layout whose memory isn't enough."""
    rank, memory = layout.memory
    kind, most = max(memory._asdict().items(), key=lambda one: one[1])
    where = f" of stage {rank} of the pipeline" if layout.degrees.pp > 1 else ""
    return (
        f"a rank{where} needs {memory.total / GIB:.1f} GiB and has {(layout.room or 0) / GIB:.1f}, the most "
        f"of it for {kind}: {most / GIB:.1f} GiB"
    )


def with_remedies(layout: Layout) -> str:
    """`too_large`, and what would make it fit."""
    return f"{too_large(layout)}: {remedies(layout)}"


def remedies(layout: Layout, more: float = 1.0) -> str:
    """The first of the changes that would make it fit; more: if so many times the memory is needed."""
    changes = _changes(layout.recipe)
    fitting = [words for words, changed in changes if _fits(changed, layout.ranks, more)][:NAMED]
    if not fitting:
        return "take more nodes, or let trainwright plan search look for a layout that fits"
    return f"{' or '.join(fitting[:NAMED])} would do"


def _fits(recipe: Recipe, ranks: int, more: float) -> bool:
    if any(check_layout(recipe, [ranks])):
        return False
    layout = Layout(recipe, resolve_degrees(recipe.parallel, ranks))
    return layout.room is None or layout.memory[1].total * more <= layout.room


def _changes(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    """One key at a time, the cheapest first; then more ranks for each copy of the model."""
    parallel, train = recipe.parallel, recipe.train
    smaller = {"micro_batch_size": 1}
    full = {"activation_checkpointing": "full"}
    for keys in (smaller, full, smaller | full):
        if all(getattr(train, key) != value for key, value in keys.items()):
            words = " ".join(f"train.{key}={value}" for key, value in keys.items())
            yield words, replace(recipe, train=replace(train, **keys))  # type: ignore[arg-type]
    if parallel.zero < 3:
        yield "parallel.zero=3", replace(recipe, parallel=replace(parallel, zero=3))
    for key in ("tp", "pp"):
        shard = parallel.dp_shard if parallel.dp_shard == -1 else parallel.dp_shard // 2
        if shard:
            degree = 2 * getattr(parallel, key)
            words = f"parallel.{key}={degree}" + (f" parallel.dp_shard={shard}" if shard > 0 else "")
            yield words, replace(recipe, parallel=replace(parallel, dp_shard=shard, **{key: degree}))
