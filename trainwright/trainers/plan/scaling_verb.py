"""`trainwright plan scaling`: how much of its pace a node keeps among more of them."""

import json
import sys
from collections.abc import Iterator
from typing import Any

from trainwright.configs.schema import Recipe
from trainwright.errors import BadRequest
from trainwright.trainers.plan.files import write
from trainwright.trainers.plan.layout import GIB, Layout
from trainwright.trainers.plan.refusals import with_remedies
from trainwright.trainers.plan.scaling import efficiency, scaling
from trainwright.trainers.plan.wording import percent, spoken, table, words

FITS = {True: "yes", False: "no", None: "?"}
HEAD = ("nodes", "ranks", "shards", "sequences", "GiB", "fits", "step", "tokens/s", "MFU", "efficiency")


def plan_scaling(recipe: Recipe) -> None:
    """Print the table, and write it into `plan_scaling.json` in `plan.dir`.

    Raises:
        BadRequest: the cluster isn't described, the layout doesn't go on it, it fits on no number of nodes, or
            the folder can't be written to.
    """
    layouts = scaling(recipe)
    print("\n".join(tables(layouts) if sys.stdout.isatty() else lines(layouts)))
    text = json.dumps(as_json(layouts), indent=1) + "\n"
    print(f"plan={write(recipe.plan.dir, {'plan_scaling.json': text}) / 'plan_scaling.json'}")
    if all(layout.fits is False for layout in layouts):
        nodes = as_json(layouts)[-1]["nodes"]
        raise BadRequest(f"the layout fits on no number of nodes; on {nodes:,} {with_remedies(layouts[-1])}")


def tables(layouts: list[Layout]) -> Iterator[str]:
    """What is printed in a terminal."""
    rows = [
        (
            f"{one['nodes']:,}",
            f"{one['ranks']:,}",
            f"{one['dp_shard']:,}",
            f"{one['global_batch_size']:,}",
            f"{one['memory'] / GIB:.1f}",
            FITS[one["fits"]],
            spoken(one["step_s"]),
            f"{one['tokens_per_s']:,.0f}",
            percent(one["mfu"]),
            "" if one["efficiency"] is None else percent(one["efficiency"]),
        )
        for one in as_json(layouts)
    ]
    yield from table(HEAD, rows)


def lines(layouts: list[Layout]) -> Iterator[str]:
    """What is printed where there is no terminal."""
    return (words(plan="scaling", **one) for one in as_json(layouts))


def as_json(layouts: list[Layout]) -> list[dict[str, Any]]:
    """A record for each number of nodes."""
    return [
        {
            "nodes": layout.ranks // (layout.recipe.cluster.ranks_per_node or layout.ranks),
            "ranks": layout.ranks,
            **layout.degrees._asdict(),
            "global_batch_size": layout.recipe.train.global_batch_size,
            "memory": layout.memory[1].total,
            "fits": layout.fits,
            "step_s": layout.time.total,
            "data_s": layout.time.data,
            "tokens_per_s": layout.tokens_per_s,
            "mfu": layout.mfu,
            "efficiency": share,
        }
        for layout, share in zip(layouts, efficiency(layouts), strict=True)
    ]
