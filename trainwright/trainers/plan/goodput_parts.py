"""What a failure and a save cost on a cluster: measured parts, each scaled by a rule that stands beside it.

Rules (docs/recovery.md tells why):

    stall, slow          as the bytes of a node: saves are sharded, so a node has 1/nodes of the state; never
                         less than measured
    save, load           likewise, and no faster than plan.storage_gb_s lets all nodes be together
    rendezvous           as the ranks: each asks the one store where all meet a fixed number of times
    start, detect, step  as measured: every node does its own at the same time
    hang                 as measured, after what resilience.hang_floor_s and hang_factor times a step make of
                         its bound; where no hang was measured, as a death
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

from trainwright.configs.schema import ModelConfig, PlanConfig, Recipe
from trainwright.errors import BadRequest
from trainwright.trainers.goodput import is_mark
from trainwright.trainers.observers.json_lines import read_lines
from trainwright.trainers.plan.goodput import Costs, Restart, mtbf_seconds

BYTES = 12  # of a parameter in a checkpoint: its fp32 weight and AdamW's two moments
MEASURE = "measure it by python benchmarks/recovery.py and give plan.measured=benchmarks/results/recovery.json"

NAMES = {
    "stall": "a save holds the loop",
    "slow": "it slows the steps beside it",
    "save": "it is written beside the training",
    "load": "a checkpoint is read",
    "start": "a process starts, without the load",
    "rendezvous": "all ranks find each other",
    "detect": "a process's death is seen",
    "hang": "a hang is seen, after its bound",
    "step": "a step",
}


@dataclass(frozen=True)
class Measured:
    """Seconds of each part on the machine where they were measured, and the checkpoint's bytes of each node."""

    seconds: dict[str, float] = field(default_factory=dict)
    bytes_per_node: float = math.nan


@dataclass(frozen=True)
class Part:
    """One part on the cluster: `measured` is None where the recipe says it outright."""

    name: str
    measured: float | None
    seconds: float
    rule: str


@dataclass(frozen=True)
class Cluster:
    """What of the machines and the model the rules need."""

    nodes: int
    ranks: int
    parameters: int
    failures_per_node_hour: float

    @property
    def bytes_per_node(self) -> float:
        return BYTES * self.parameters / self.nodes


def cluster(recipe: Recipe) -> Cluster:
    """The cluster that `recipe` names, or the nodes that it runs on."""
    nodes = recipe.cluster.nodes or int(recipe.launch.nodes.split(":")[-1])
    ranks = nodes * (recipe.launch.procs_per_node or 1)
    return Cluster(nodes, ranks, parameter_count(recipe.model), recipe.cluster.failures_per_node_hour)


def parameter_count(model: ModelConfig) -> int:
    """The parameters of a model, by its shape."""
    heads = model.num_attention_heads
    head = model.head_dim or model.hidden_size // heads
    attention = 2 * model.hidden_size * head * (heads + (model.num_key_value_heads or heads))
    feed_forward, experts = 3 * model.hidden_size * model.intermediate_size, model.moe.num_local_experts
    if experts is not None:
        feed_forward = experts * (feed_forward + model.hidden_size)  # with the router's row
    layer = attention + feed_forward + 2 * model.hidden_size
    tables = 1 if model.tie_word_embeddings else 2
    embeddings = tables * model.vocab_size * model.hidden_size
    return model.num_hidden_layers * layer + embeddings + model.hidden_size


def parts(plan: PlanConfig, measured: Measured, on: Cluster) -> dict[str, Part]:
    """Each part on the cluster, by its key in NAMES.

    Raises:
        BadRequest: a part is neither given nor measured.
    """
    return {key: _part(key, plan, measured, on) for key in NAMES}


def _part(key: str, plan: PlanConfig, measured: Measured, on: Cluster) -> Part:
    given: float | None = getattr(plan, f"{key}_s")
    if given is not None:
        return Part(NAMES[key], None, given, f"given: plan.{key}_s")
    if key == "hang" and key not in measured.seconds:
        return replace(
            _part("detect", plan, measured, on), name=NAMES[key], rule="as a death: none was measured"
        )
    if key not in measured.seconds:
        raise BadRequest(f"plan.{key}_s isn't known ({NAMES[key]}): give it in seconds, or {MEASURE}")
    seconds = measured.seconds[key]
    if key == "rendezvous":
        return Part(NAMES[key], seconds, seconds * on.ranks, f"a rank's × {on.ranks:,} ranks")
    if key not in ("stall", "slow", "save", "load"):
        return Part(NAMES[key], seconds, seconds, "as measured: every node at the same time")
    if math.isnan(measured.bytes_per_node):
        raise BadRequest(f"plan.{key}_s isn't known: {plan.measured} says no bytes_per_node to scale it by")
    factor = max(1.0, on.bytes_per_node / measured.bytes_per_node)
    sizes = f"a node's {_size(on.bytes_per_node)} over the measured {_size(measured.bytes_per_node)}"
    rule = f"× {factor:.3g}: {sizes}" if factor > 1 else f"as measured: {sizes} is less"
    scaled = seconds * factor
    shared = BYTES * on.parameters / (plan.storage_gb_s * 1e9) if plan.storage_gb_s else 0.0
    if key in ("save", "load") and shared > scaled:
        return Part(NAMES[key], seconds, shared, f"{_size(BYTES * on.parameters)} at plan.storage_gb_s")
    return Part(NAMES[key], seconds, scaled, rule)


def _size(count: float) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def hang_seconds(recipe: Recipe, step_s: float) -> float:
    """How long the watchdog lets a step take before it ends the run."""
    return max(recipe.resilience.hang_floor_s, recipe.resilience.hang_factor * step_s)


def costs(recipe: Recipe, of: dict[str, Part], on: Cluster) -> Costs:
    """The parts put together: four kinds of failure, with and without a hang, with and without a new node."""
    plan = recipe.plan
    again = sum(of[key].seconds for key in ("rendezvous", "start", "load"))
    seen = {False: of["detect"].seconds, True: hang_seconds(recipe, of["step"].seconds) + of["hang"].seconds}
    shares = {False: 1 - plan.hang_share, True: plan.hang_share}
    kinds = [
        Restart(shares[hangs] * share, seen[hangs] + again + wait, f"{'a hang' if hangs else 'a crash'}{how}")
        for hangs in (False, True)
        for share, wait, how in (
            (1 - plan.replace_share, 0.0, ""),
            (plan.replace_share, plan.replace_s, ", a node replaced"),
        )
    ]
    mtbf = mtbf_seconds(on.nodes, on.failures_per_node_hour)
    happening = tuple(kind for kind in kinds if kind.share > 0)
    return Costs(of["stall"].seconds + of["slow"].seconds, of["save"].seconds, happening, mtbf)


def read_measured(plan: PlanConfig) -> Measured:
    """What `plan.measured` holds; nothing where it isn't given.

    Raises:
        BadRequest: there is no such file, or nothing in it was measured.
    """
    if plan.measured is None:
        return Measured()
    path = Path(plan.measured).expanduser()
    if path.is_dir():
        return measured_in_run(path)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadRequest(f"plan.measured={path} can't be read ({error}): {MEASURE}") from error
    names = {"rendezvous_s_per_rank": "rendezvous"} | {f"{key}_s": key for key in NAMES if key != "rendezvous"}
    seconds = {
        key: float(record[name]) for name, key in names.items() if type(record.get(name)) in (int, float)
    }
    if not seconds:
        raise BadRequest(f"plan.measured={path} has none of {', '.join(names)}: {MEASURE}")
    return Measured(seconds, float(record.get("bytes_per_node", math.nan)))


def measured_in_run(folder: Path) -> Measured:
    """The parts as a run's own files show them: events.jsonl the saves, ledger.jsonl starts, steps and downs.

    Raises:
        BadRequest: no run left them there.
    """
    events = [record for _, record in read_lines(folder / "events.jsonl")]
    marks = [record for _, record in read_lines(folder / "ledger.jsonl") if is_mark(record)]
    found = {
        "stall": [e["stall_s"] for e in events if e.get("event") == "checkpoint_begun" and "stall_s" in e],
        "save": [e["write_s"] for e in events if e.get("event") == "checkpoint" and "write_s" in e],
        "step": [mark["step_s"] for mark in marks if mark["at"] == "step"],
        "slow": list(slowed(marks)),
        "detect": list(_gaps(marks)),
    }
    seconds = {key: max(0.0, median(values)) for key, values in found.items() if values}
    if not seconds:
        raise BadRequest(f"plan.measured={folder} is no run's folder: it has no ledger.jsonl or events.jsonl")
    starts: dict[str, list[float]] = {"start": [], "resume": []}
    for kind, took in _starts(marks):
        starts[kind].append(max(0.0, took - seconds.get("step", 0.0)))
    fresh, resumed = (median(starts[kind]) if starts[kind] else None for kind in ("start", "resume"))
    if (start := fresh if fresh is not None else resumed) is not None:
        # A start finds its peers and compiles too; where a run only ever resumed, its load is in it as well.
        seconds |= {"start": start, "load": max(0.0, (resumed or start) - start), "rendezvous": 0.0}
    sizes = [e["bytes"] for e in events if e.get("event") == "checkpoint" and type(e.get("bytes")) is int]
    return Measured(seconds, float(sizes[-1]) if sizes else math.nan)


def slowed(marks: list[dict[str, Any]]) -> Iterator[float]:
    """What the steps beside each save took longer than as many others, on a busy machine below zero too.

    The mean of the others, not their median: a machine that halts now and then halts beside saves as well.
    """
    alone: list[float] = []
    beside: list[list[float]] = []
    saves = False
    for mark in marks:
        if mark["at"] in ("stall", "saved", "written", "begin"):
            saves = mark["at"] == "stall"
            if saves:
                beside.append([])
        elif mark["at"] == "step":
            (beside[-1] if saves else alone).append(mark["step_s"])
    usual = fmean(alone) if alone else math.nan
    return (sum(took) - usual * len(took) for took in beside if took and alone)


def _gaps(marks: list[dict[str, Any]]) -> Iterator[float]:
    """From the last that each process did to the next one's beginning, where it didn't end as it should."""
    did: float | None = None
    for mark in marks:
        if mark["at"] == "begin":
            if did is not None:
                yield max(0.0, mark["t"] - did)
            did = mark["t"]
        elif mark["at"] != "stop":
            did = mark["t"]
        elif str(mark.get("reason")).startswith(("done", "Preempted")):
            did = None


def _starts(marks: list[dict[str, Any]]) -> Iterator[tuple[str, float]]:
    """Whether each process that came to a step started or resumed, and how long until its first step's end."""
    began, kind = math.nan, ""
    for mark in marks:
        if mark["at"] == "begin":
            began, kind = mark["t"], ""
        elif mark["at"] in ("start", "resume"):
            kind = mark["at"]
        elif mark["at"] == "step" and kind:
            yield kind, mark["t"] - began
            kind = ""
