"""`trainwright plan goodput`: the best interval between saves, and how much of a long run trains the model."""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from trainwright.configs.schema import Recipe
from trainwright.trainers.observers.json_lines import to_line
from trainwright.trainers.plan.files import write
from trainwright.trainers.plan.goodput import daly_interval, young_interval
from trainwright.trainers.plan.goodput_outlook import AUTOMATIC, BY_HAND, GOAL, Plan, plan
from trainwright.trainers.plan.goodput_page import RATE_HEAD, page, rate_row
from trainwright.trainers.plan.wording import percent, spoken, table


def plan_goodput(recipe: Recipe) -> None:
    """Print the plan, and write `goodput_plan.html` and `goodput_plan.json` into `plan.dir`.

    Raises:
        BadRequest: a part of the calculation isn't known, or the folder can't be written to.
    """
    made = plan(recipe)
    print("\n".join(lines(made)))
    texts = {"html": page(made), "json": json.dumps(as_json(made), indent=2) + "\n"}
    folder = write(recipe.plan.dir, {f"goodput_plan.{end}": text for end, text in texts.items()})
    print(f"plan={folder / 'goodput_plan.html'}")


def lines(made: Plan) -> Iterator[str]:
    """What is printed."""
    best, on = made.outlook, made.on
    yield (
        f"nodes {on.nodes:,}, ranks {on.ranks:,}, parameters {on.parameters:,}; "
        f"a failure every {spoken(best.costs.mtbf)} ({on.failures_per_node_hour:g} of a node in an hour)"
    )
    rows = [
        (part.name, "" if part.measured is None else spoken(part.measured), spoken(part.seconds), part.rule)
        for part in made.parts.values()
    ]
    yield from table(("part", "measured", "cluster", "rule"), rows)
    kinds = [(kind.name, f"{kind.share:.0%}", spoken(kind.seconds)) for kind in best.costs.restarts]
    yield from table(("failure", "share", "down"), [*kinds, ("mean", "", spoken(best.costs.mean_restart))])
    yield from table(RATE_HEAD, [rate_row(name, outlook) for name, outlook in made.by_rate.items()])
    first, higher = (
        spoken(interval(best.costs.stall, best.costs.mtbf)) for interval in (young_interval, daly_interval)
    )
    steps = f", {best.steps:,} steps" if best.steps else ""
    yield f"best interval: {spoken(best.interval)}{steps} (Young's first order {first}, Daly's {higher})"
    losses = ", ".join(f"{name} {percent(share)}" for name, share in best.losses.items())
    yield f"effective utilisation: {percent(best.utilisation)} by the formula (lost: {losses})"
    low, high = (made.runs[int(share * (len(made.runs) - 1))] for share in (0.05, 0.95))
    yield (
        f"simulated: {percent(made.mean)} in the mean of {len(made.runs):,} runs of {made.days:g} days, "
        f"nine of ten between {percent(low)} and {percent(high)}"
    )
    if made.recipe_interval:
        every, share = made.recipe_interval
        yield f"at checkpoint.every={every}: {percent(share)}"
    for share in (GOAL, AUTOMATIC / 100):
        room = best.room(share)
        if 0 < room < math.inf:
            yield f"restarts could take {spoken(room)} longer and it would still be {percent(share)}"
    yield f"published for 128 trn1.32xlarge: {AUTOMATIC} % with automatic recovery, {BY_HAND} % by hand"


def as_json(made: Plan) -> dict[str, Any]:
    """The plan's numbers; what is infinite is null."""
    best = made.outlook
    record = {
        "cluster": {**asdict(made.on), "bytes_per_node": made.on.bytes_per_node},
        "parts": {key: asdict(part) for key, part in made.parts.items()},
        "restarts": [asdict(kind) for kind in best.costs.restarts],
        "mtbf_s": best.costs.mtbf,
        "interval_s": best.interval,
        "interval_steps": best.steps,
        "young_interval_s": young_interval(best.costs.stall, best.costs.mtbf),
        "daly_interval_s": daly_interval(best.costs.stall, best.costs.mtbf),
        "utilisation": best.utilisation,
        "losses": best.losses,
        "simulated": {"days": made.days, "mean": made.mean, "runs": made.runs},
        "by_rate": {
            name: {"mtbf_s": o.costs.mtbf, "interval_s": o.interval, "utilisation": o.utilisation}
            for name, o in made.by_rate.items()
        },
        "published": {"automatic": AUTOMATIC / 100, "by_hand": BY_HAND / 100},
    }
    return json.loads(to_line(record))  # type: ignore[no-any-return]
