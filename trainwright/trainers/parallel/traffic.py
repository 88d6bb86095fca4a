"""What a training step sends between ranks: every collective's calls and bytes, from the recipe alone.

The bytes of a call are those of the whole tensor on one rank, the larger of what goes in and what comes out: an
all-gather's output, a reduce-scatter's input, the tensor of an all-reduce, a broadcast or a send. `crossing`
makes of them what crosses the wire. Nothing is allocated (the model is made on the meta device) and no process
group is needed. A step is one between others, without validation or a checkpoint; compiled layers that also
recompute their activations may send less.

This page follows `tensor_parallel.py` (the collectives of each style), `data_parallel.py` (which units FSDP
gathers and reduces when), `recompute.py`, `facts.py`, `data/peers.py` and, for the order of a pipeline's work,
the schedules of torch.distributed.pipelining; tests count a real step.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import Placement, Shard

from trainwright.configs.degrees import Degrees, stages_per_rank
from trainwright.configs.schema import ModelConfig, Recipe
from trainwright.models import cross_entropy
from trainwright.models.llama import Head, Llama
from trainwright.models.llama_plan import llama_plan, llama_units
from trainwright.models.plan import Style
from trainwright.trainers.data.cursor import new_cursor
from trainwright.trainers.data.dealing import owned_lanes, rows_in_a_batch
from trainwright.trainers.parallel.plan import styles_of, units_of
from trainwright.trainers.parallel.stages import layers_of_rank
from trainwright.trainers.parallel.tensor_parallel import few_groups, placement_of
from trainwright.trainers.precision import PRECISIONS, REDUCES

# Kinds and how often a rank's share of the whole tensor, (n - 1) / n of it, crosses the wire to or from it.
# A platform may carry them out by sends or an all-to-all, of the same bytes.
CROSSINGS = {"all_gather": 1, "reduce_scatter": 1, "all_reduce": 2, "broadcast": 1}
SEND = "send"  # from rank to rank: all of it crosses

# What a layer's input or output does, forward and backward; by whether activations are cut by position.
BEGIN = {True: ("all_gather", "reduce_scatter"), False: (None, "all_reduce")}
END = {True: ("reduce_scatter", "all_gather"), False: ("all_reduce", None)}

FP32 = 4
FACTS = 12  # float32 numbers, see `facts.agree`


class Traffic(NamedTuple):
    """Collectives of a kind in a step, of one rank.

    axis: of the mesh, `world` for all ranks, or `peers` for those with the same sequences. what: travels, in
    words. bytes: of all the calls together.
    """

    axis: str
    kind: str
    what: str
    calls: int
    bytes: int


def crossing(kind: str, size: int, sent: int) -> int:
    """The bytes that a collective of `sent` bytes among `size` ranks sends from each, or brings to each.

    By the best algorithms for large tensors; a broadcast's is the mean over the ranks.
    """
    return sent if kind == SEND else CROSSINGS[kind] * (size - 1) * sent // size


def world_axis(degrees: Degrees) -> str:
    """The axis that spans all ranks, whose process group is that of the world; else `world`."""
    ranks = math.prod(degrees)
    return next((axis for axis, degree in degrees._asdict().items() if degree == ranks), "world")


def by_group(traffic: Iterable[Traffic], degrees: Degrees) -> dict[tuple[str, str], tuple[int, int]]:
    """Calls and bytes by axis and kind; those of the world go to the axis that has its group."""
    calls: Counter[tuple[str, str]] = Counter()
    sent: Counter[tuple[str, str]] = Counter()
    everyone = {"world", "peers"} if degrees.data == 1 else {"world"}
    for one in traffic:
        key = (world_axis(degrees) if one.axis in everyone else one.axis, one.kind)
        calls[key] += one.calls
        sent[key] += one.bytes
    return {key: (calls[key], sent[key]) for key in sorted(calls)}


class Part(NamedTuple):
    """A stage's part of the model, or the whole: its modules' styles, its units, and its `orders_of_work`."""

    model: Llama
    styles: dict[str, Style]
    units: list[list[nn.Module]]
    order: str = ""


_made: dict[tuple[Any, ...], Part] = {}  # on the meta device: a search asks for the same ones again and again


def step_traffic(recipe: Recipe, degrees: Degrees, data_rank: int = 0, pp_rank: int = 0) -> list[Traffic]:
    """The collectives of a step of `recipe` on a mesh of `degrees`.

    data_rank: ranks differ in the cursor of their lanes, and in norm gradients that don't part evenly.
    pp_rank: and in the stages that they have.
    """
    if math.prod(degrees) == 1:
        return []
    parts = _parts(recipe, degrees, pp_rank)
    found = [Traffic("world", "all_reduce", "facts of the step", 1, FACTS * FP32)]
    for part in parts:
        if degrees.pp > 1:
            found += _between_stages(recipe, degrees, part)
        if degrees.tp > 1:
            found += _activations(recipe, degrees, part)
    if degrees.tp > 1:
        if parts[-1].model.ends:
            found += _loss(recipe, degrees)
        found += _partial_gradients(recipe, degrees, parts, data_rank)
    if degrees.tp * degrees.pp > 1:
        found += _batch(recipe, degrees, data_rank)
    if degrees.data > 1:
        for part in parts:
            found += _weights_and_gradients(recipe, degrees, part)
    return _together(found)


def _parts(recipe: Recipe, degrees: Degrees, pp_rank: int) -> list[Part]:
    orders = orders_of_work(recipe, degrees, pp_rank)
    own = layers_of_rank(recipe, pp_rank, degrees.pp) if degrees.pp > 1 else [None]
    return [
        _part(recipe.model, layers)._replace(order=order) for layers, order in zip(own, orders, strict=True)
    ]


def _part(config: ModelConfig, layers: range | None) -> Part:
    key = (astuple(config), layers)
    if key not in _made:
        with torch.device("meta"):
            model = Llama(config, layers=layers)
        styles = styles_of(model, llama_plan(config), part=True)
        _made[key] = Part(model, styles, units_of(model, llama_units(config), part=True))
    return _made[key]


def work_of_rank(recipe: Recipe, degrees: Degrees, pp_rank: int) -> list[tuple[int, str]]:
    """A rank's forward passes (F) and backward passes (B) of a step in order, each with which of its stages.

    A rank is so many forward passes ahead that the first backward pass reaches it when they are done, twice as
    many where stages are interleaved (arXiv 2104.04473); then they alternate. It takes each of its stages as
    many times in a row as there are ranks.
    """
    count, parallel = len(micro_batches(recipe, degrees)), recipe.parallel
    stages = stages_per_rank(parallel) if degrees.pp > 1 else 1
    in_a_row = count // max(1, count // degrees.pp)
    hops = (2 if parallel.pp_schedule == "interleaved_1f1b" else 1) * (degrees.pp - 1 - pp_rank)
    ahead = min((stages - 1) * in_a_row + hops, count * stages)
    work = []
    for turn in range(count * stages + ahead):
        if turn < count * stages:
            work.append((turn // in_a_row % stages, "F"))
        if turn >= ahead:
            work.append((stages - 1 - (turn - ahead) // in_a_row % stages, "B"))
    return work


def orders_of_work(recipe: Recipe, degrees: Degrees, pp_rank: int) -> list[str]:
    """The order of `work_of_rank` for each of a rank's stages."""
    stages = stages_per_rank(recipe.parallel) if degrees.pp > 1 else 1
    work = work_of_rank(recipe, degrees, pp_rank)
    return ["".join(kind for own, kind in work if own == stage) for stage in range(stages)]


def _together(traffic: Iterable[Traffic]) -> list[Traffic]:
    """Of the many of the same axis, kind and purpose one."""
    sums: dict[tuple[str, str, str], tuple[int, int]] = {}
    for axis, kind, what, calls, sent in traffic:
        before = sums.get((axis, kind, what), (0, 0))
        sums[axis, kind, what] = before[0] + calls, before[1] + sent
    return [Traffic(*key, *both) for key, both in sums.items()]


def micro_batches(recipe: Recipe, degrees: Degrees) -> list[int]:
    """The sequences of each micro-batch of a rank."""
    rows, size = _rows(recipe, degrees), recipe.train.micro_batch_size
    if degrees.pp > 1:  # the last one is filled up
        return [min(size, rows)] * math.ceil(rows / size)
    return [min(size, rows - start) for start in range(0, rows, size)]


def _rows(recipe: Recipe, degrees: Degrees) -> int:
    return rows_in_a_batch(_lanes(recipe), recipe.train.global_batch_size, degrees.data)


def _lanes(recipe: Recipe) -> int:
    return recipe.data.lanes or recipe.train.global_batch_size


def _sp(recipe: Recipe) -> bool:
    return recipe.parallel.sp is not False


def _element(recipe: Recipe) -> int:
    return PRECISIONS[recipe.precision.mode].computes_in.itemsize


def _reduced_element(recipe: Recipe) -> int:
    return REDUCES[recipe.precision.reduce].itemsize


def _between_stages(recipe: Recipe, degrees: Degrees, part: Part) -> Iterator[Traffic]:
    """All positions of a rank by the hidden size, onward and back."""
    batches = micro_batches(recipe, degrees)
    positions = sum(batches) * recipe.train.seq_len // (degrees.tp if _sp(recipe) else 1)
    sent = positions * recipe.model.hidden_size * _element(recipe)
    if not part.model.ends:
        yield Traffic("pp", SEND, "activations", len(batches), sent)
    if not part.model.begins:
        yield Traffic("pp", SEND, "activations' gradients", len(batches), sent)


def _activations(recipe: Recipe, degrees: Degrees, part: Part) -> Iterator[Traffic]:
    """A collective at each cut layer's begin or end, of all positions by the width there."""
    batches = micro_batches(recipe, degrees)
    positions = sum(batches) * recipe.train.seq_len
    recomputes = recipe.train.activation_checkpointing != "none"
    layer_ends = _layer_ends(part.styles)
    for name, style in part.styles.items():
        if style in ("sequence", "replicate"):
            continue
        module = part.model.get_submodule(name)
        rows, columns = module.get_parameter("weight").shape
        begins = style in ("column", "kv_groups") or isinstance(module, Head)
        forward, backward = (BEGIN if begins else END)[_sp(recipe)]
        width = rows if style == "row" else columns
        passes = [(forward, "activations"), (backward, "activations' gradients")]
        # A layer is made again up to the last value that its backward pass needs: its end isn't.
        if recomputes and name.startswith("layers.") and name not in layer_ends:
            passes.append((forward, "activations made again"))
        for kind, what in passes:
            if kind is not None:
                yield Traffic("tp", kind, what, len(batches), positions * width * _element(recipe))


def _layer_ends(styles: dict[str, Style]) -> set[str]:
    """Of each layer the module whose output is the last to be summed."""
    ends = {name.split(".")[1]: name for name, style in styles.items() if style == "row"}
    return set(ends.values())


def _loss(recipe: Recipe, degrees: Degrees) -> Iterator[Traffic]:
    """Three float32 a position: the largest logit first, then two sums; a chunk of positions at a time."""
    chunk = max(1, cross_entropy.CHUNK_ELEMENTS // (recipe.model.vocab_size // degrees.tp))
    positions = [rows * recipe.train.seq_len for rows in micro_batches(recipe, degrees)]
    chunks = sum(math.ceil(n / chunk) for n in positions)
    yield Traffic("tp", "all_reduce", "loss", 2 * chunks, 3 * sum(positions) * FP32)


def _partial_gradients(
    recipe: Recipe, degrees: Degrees, parts: Sequence[Part], data_rank: int
) -> Iterator[Traffic]:
    """Of the norms, and of projections that are whole on all peers because groups of heads are few."""
    shard = data_rank % degrees.dp_shard
    elements = 0
    for model, name, style in ((part.model, *named) for part in parts for named in part.styles.items()):
        if (style == "sequence" and _sp(recipe)) or few_groups(model, name, style, degrees.tp):
            rows, *columns = model.get_submodule(name).get_parameter("weight").shape
            own = math.ceil(rows / degrees.dp_shard)
            elements += max(0, min(own, rows - shard * own)) * math.prod(columns)
    sent = elements * _reduced_element(recipe)
    yield Traffic("tp", "all_reduce", "gradients in parts", min(elements, 1), sent)


def _batch(recipe: Recipe, degrees: Degrees, data_rank: int) -> Iterator[Traffic]:
    """Tokens and targets as int64, documents as int32, the cursor as int64, and two numbers more."""
    positions = _rows(recipe, degrees) * recipe.train.seq_len
    lanes = len(owned_lanes(_lanes(recipe), data_rank, degrees.data))
    cursor = new_cursor(lanes, len(recipe.data.mix) or 1).nbytes
    axis = "tp" if degrees.pp == 1 else "peers"
    yield Traffic(axis, "broadcast", "batch", 1, (8 + 8 + 4) * positions + cursor + 2 * 8)


def _weights_and_gradients(recipe: Recipe, degrees: Degrees, part: Part) -> Iterator[Traffic]:
    """FSDP's, unit by unit. zero 0 is a mesh whose dp_shard is 1: its units are only reduced."""
    zero, element, sum_element = recipe.parallel.zero, _element(recipe), _reduced_element(recipe)
    reduced = part.order.count("B") if zero >= 2 else 1
    placed = {
        id(parameter): placement_of(part.model, name, style, degrees.tp)
        for name, style in part.styles.items()
        for parameter in part.model.get_submodule(name).parameters()
    }
    for unit in part.units:
        parameters = {id(p): p for module in unit for p in module.parameters()}
        elements = sum(_padded(p.shape, placed[key], degrees) for key, p in parameters.items())
        if degrees.dp_shard > 1:
            forward, again = _gathers(part.order, zero, unit)
            yield Traffic("dp_shard", "all_gather", "weights", forward, forward * elements * element)
            if again:
                yield Traffic("dp_shard", "all_gather", "weights again", again, again * elements * element)
            sent = reduced * elements * sum_element
            yield Traffic("dp_shard", "reduce_scatter", "gradients", reduced, sent)
        if degrees.dp_replicate > 1:
            own = elements // degrees.dp_shard
            yield Traffic("dp_replicate", "all_reduce", "gradients", 1, own * sum_element)


def _gathers(order: str, zero: int, unit: list[nn.Module]) -> tuple[int, int]:
    """How often a unit's weights are gathered for a forward and for a backward pass, when they aren't there.

    That with the head makes the loss together with its gradients, so it isn't dropped after the forward pass;
    an embedding is read by index, so the backward pass doesn't need it.
    """
    after_forward = zero == 3 and not any(isinstance(module, Head) for module in unit)
    here, gathered = False, {"F": 0, "B": 0}
    for work in order:
        if not here and not (work == "B" and isinstance(unit[0], nn.Embedding)):
            gathered[work] += 1
            here = True
        if after_forward if work == "F" else zero >= 2:
            here = False
    return gathered["F"], gathered["B"]


def _padded(shape: torch.Size, placement: Placement, degrees: Degrees) -> int:
    """Elements of a tensor-parallel peer's part, its dim 0 filled up to equal shards, as FSDP does it."""
    part = list(shape)
    if isinstance(placement, Shard):
        part[placement.dim] //= degrees.tp
    part[0] = math.ceil(part[0] / degrees.dp_shard) * degrees.dp_shard
    return math.prod(part)
