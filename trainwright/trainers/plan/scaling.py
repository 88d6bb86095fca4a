"""Weak scaling: the same work for each data-parallel rank on more and more nodes."""

from dataclasses import replace

from trainwright.configs.check import check_layout
from trainwright.configs.degrees import Degrees, resolve_degrees
from trainwright.configs.planned import planned_ranks
from trainwright.configs.schema import Recipe
from trainwright.errors import BadRequest
from trainwright.trainers.plan.layout import Layout
from trainwright.trainers.plan.refusals import NOT_TIMED

NODES = 256  # unless cluster.nodes says how many


def scaling(recipe: Recipe) -> list[Layout]:
    """The recipe on 1, 2, 4, ... nodes of its cluster, from as many as its model needs.

    Sequences of a data-parallel rank stay as they are, so the global batch grows with the nodes; shards grow
    with them, or replicas where the recipe has some.

    Raises:
        BadRequest: the cluster isn't described, or the layout doesn't go on it.
    """
    per_node, own = recipe.cluster.ranks_per_node, _own_degrees(recipe)
    if per_node is None:
        raise BadRequest(NOT_TIMED)
    rows = recipe.train.global_batch_size / own.data
    model_ranks, layouts, nodes = own.tp * own.pp, [], 1
    while nodes <= (recipe.cluster.nodes or NODES):
        data, rest = divmod(nodes * per_node, model_ranks)
        if data and not rest and not (data % own.dp_shard if own.dp_replicate > 1 else 0):
            layouts.append(_on(recipe, own, nodes * per_node, data, round(rows * data)))
        nodes *= 2
    if not layouts:
        raise BadRequest(
            f"parallel.tp={own.tp} parallel.pp={own.pp} doesn't go on {nodes // 2} nodes of {per_node} ranks: "
            "raise cluster.nodes or lower the degrees"
        )
    if not layouts[0].timed:
        raise BadRequest(NOT_TIMED)
    return layouts


def _own_degrees(recipe: Recipe) -> Degrees:
    parallel = recipe.parallel
    if parallel.dp_shard == -1:
        return resolve_degrees(parallel, planned_ranks(recipe))
    return Degrees(parallel.pp, parallel.dp_replicate, parallel.dp_shard, parallel.tp)


def _on(recipe: Recipe, own: Degrees, ranks: int, data: int, batch: int) -> Layout:
    shard = own.dp_shard if own.dp_replicate > 1 else data
    parallel = replace(recipe.parallel, dp_replicate=data // shard, dp_shard=shard)
    train = replace(recipe.train, global_batch_size=batch)
    grown = replace(recipe, parallel=parallel, train=train, data=replace(recipe.data, lanes=None))
    if said := list(check_layout(grown, [ranks])):
        raise BadRequest(said[0])
    return Layout(grown, resolve_degrees(parallel, ranks))


def efficiency(layouts: list[Layout]) -> list[float | None]:
    """Of each that fits, its tokens a second and rank as a share of the first's that does; else None."""
    paces = [None if layout.fits is False else layout.tokens_per_s / layout.ranks for layout in layouts]
    first = next((pace for pace in paces if pace is not None), 1.0)
    return [None if pace is None else pace / first for pace in paces]
