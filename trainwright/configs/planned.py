"""How many ranks a run would have that is only planned."""

import math
from collections.abc import Sequence

from trainwright.configs.schema import Recipe
from trainwright.errors import BadRequest


def planned_ranks(recipe: Recipe) -> int:
    """The ranks of the recipe's cluster; without one, those that its degrees of parallelism make.

    Raises:
        BadRequest: neither says it, or there are nodes of no kind.
    """
    cluster, parallel = recipe.cluster, recipe.parallel
    if cluster.ranks_per_node is not None:
        return cluster.ranks_per_node * (cluster.nodes or 1)
    if cluster.nodes is not None:
        raise BadRequest(
            f"cluster.nodes={cluster.nodes} says how many nodes there are and nothing says of which kind: name "
            "it, as by cluster=trn1.32xlarge, or leave cluster.nodes out"
        )
    if parallel.dp_shard == -1:
        raise BadRequest(
            "parallel.dp_shard=-1 takes the ranks that are left, and nothing says how many there are: give "
            "cluster=NAME cluster.nodes=N, or parallel.dp_shard"
        )
    return math.prod((parallel.pp, parallel.dp_replicate, parallel.dp_shard, parallel.tp))


def planned_worlds(recipe: Recipe) -> Sequence[int]:
    """The one number of ranks that the recipe's layout is held against; none where it can't be a number."""
    given = recipe.cluster.nodes, recipe.cluster.ranks_per_node
    return [] if any(number is not None and number < 1 for number in given) else [planned_ranks(recipe)]


def any_world(recipe: Recipe) -> Sequence[int]:
    """None: the layout will be chosen later, or doesn't matter."""
    return []
