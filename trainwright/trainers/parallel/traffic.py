"""What a training step sends between ranks: every collective's calls and bytes, from the recipe alone.

The bytes of a call are those of the whole tensor on one rank, the larger of what goes in and what comes out: an
all-gather's output, a reduce-scatter's input, the tensor of an all-reduce or a broadcast. `crossing` makes of
them what crosses the wire. Nothing is allocated (the model is made on the meta device) and no process group
is needed. A step is one between others, without validation or a checkpoint; compiled layers that also
recompute their activations may send less.

This page follows `tensor_parallel.py` (the collectives of each style), `data_parallel.py` (which units FSDP
gathers and reduces when), `recompute.py`, `facts.py` and `data/peers.py`; tests count a real step.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import Placement, Shard

from trainwright.configs.degrees import Degrees
from trainwright.configs.schema import Recipe
from trainwright.models import cross_entropy
from trainwright.models.llama import Head, Llama
from trainwright.models.llama_plan import llama_plan, llama_units
from trainwright.models.plan import Style
from trainwright.trainers.data.cursor import new_cursor
from trainwright.trainers.data.dealing import owned_lanes, rows_in_a_batch
from trainwright.trainers.parallel.plan import styles_of, units_of
from trainwright.trainers.parallel.tensor_parallel import few_groups, placement_of
from trainwright.trainers.precision import PRECISIONS, REDUCES

# Kinds and how often a rank's share of the whole tensor, (n - 1) / n of it, crosses the wire to or from it.
# A platform may carry them out by sends or an all-to-all, of the same bytes.
CROSSINGS = {"all_gather": 1, "reduce_scatter": 1, "all_reduce": 2, "broadcast": 1}

# What a layer's input or output does, forward and backward; by whether activations are cut by position.
BEGIN = {True: ("all_gather", "reduce_scatter"), False: (None, "all_reduce")}
END = {True: ("reduce_scatter", "all_gather"), False: ("all_reduce", None)}

FP32 = 4
FACTS = 9  # float32 numbers, see `facts.agree`


class Traffic(NamedTuple):
    """Collectives of a kind in a step, of one rank.

    axis: of the mesh, or `world` for all ranks. what: travels, in words. bytes: of all the calls together.
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
    return CROSSINGS[kind] * (size - 1) * sent // size


def world_axis(degrees: Degrees) -> str:
    """The axis that spans all ranks, whose process group is that of the world; else `world`."""
    ranks = math.prod(degrees)
    return next((axis for axis, degree in degrees._asdict().items() if degree == ranks), "world")


def by_group(traffic: Iterable[Traffic], degrees: Degrees) -> dict[tuple[str, str], tuple[int, int]]:
    """Calls and bytes by axis and kind; those of the world go to the axis that has its group."""
    calls: Counter[tuple[str, str]] = Counter()
    sent: Counter[tuple[str, str]] = Counter()
    for one in traffic:
        key = (world_axis(degrees) if one.axis == "world" else one.axis, one.kind)
        calls[key] += one.calls
        sent[key] += one.bytes
    return {key: (calls[key], sent[key]) for key in sorted(calls)}


def step_traffic(recipe: Recipe, degrees: Degrees, data_rank: int = 0) -> list[Traffic]:
    """The collectives of a step of `recipe` on a mesh of `degrees`.

    data_rank: ranks differ in the cursor of their lanes, and in norm gradients that don't part evenly.
    """
    if math.prod(degrees) == 1:
        return []
    with torch.device("meta"):
        model = Llama(recipe.model)
    styles = styles_of(model, llama_plan(recipe.model))
    found = [Traffic("world", "all_reduce", "facts of the step", 1, FACTS * FP32)]
    if degrees.tp > 1:
        found += _activations(recipe, degrees, model, styles)
        found += _loss(recipe, degrees)
        found += _partial_gradients(recipe, degrees, model, styles, data_rank)
        found += _batch(recipe, degrees, data_rank)
    if degrees.data > 1:
        found += _weights_and_gradients(recipe, degrees, model, styles)
    return _together(found)


def _together(traffic: Iterable[Traffic]) -> list[Traffic]:
    """Of the many of the same axis, kind and purpose one."""
    sums: dict[tuple[str, str, str], tuple[int, int]] = {}
    for axis, kind, what, calls, sent in traffic:
        before = sums.get((axis, kind, what), (0, 0))
        sums[axis, kind, what] = before[0] + calls, before[1] + sent
    return [Traffic(*key, *both) for key, both in sums.items()]


def micro_batches(recipe: Recipe, degrees: Degrees) -> list[int]:
    """The sequences of each micro-batch of a rank."""
    train = recipe.train
    rows = rows_in_a_batch(_lanes(recipe), train.global_batch_size, degrees.data)
    return [min(train.micro_batch_size, rows - start) for start in range(0, rows, train.micro_batch_size)]


def _lanes(recipe: Recipe) -> int:
    return recipe.data.lanes or recipe.train.global_batch_size


def _sp(recipe: Recipe) -> bool:
    return recipe.parallel.sp is not False


def _element(recipe: Recipe) -> int:
    return PRECISIONS[recipe.precision.mode].computes_in.itemsize


def _reduced_element(recipe: Recipe) -> int:
    return REDUCES[recipe.precision.reduce].itemsize


def _activations(
    recipe: Recipe, degrees: Degrees, model: nn.Module, styles: dict[str, Style]
) -> Iterator[Traffic]:
    """A collective at each cut layer's begin or end, of all positions by the width there."""
    batches = micro_batches(recipe, degrees)
    positions = sum(batches) * recipe.train.seq_len
    recomputes = recipe.train.activation_checkpointing != "none"
    layer_ends = _layer_ends(styles)
    for name, style in styles.items():
        if style in ("sequence", "replicate"):
            continue
        module = model.get_submodule(name)
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
    recipe: Recipe, degrees: Degrees, model: nn.Module, styles: dict[str, Style], data_rank: int
) -> Iterator[Traffic]:
    """Of the norms, and of projections that are whole on all peers because groups of heads are few."""
    shard = data_rank % degrees.dp_shard
    elements = 0
    for name, style in styles.items():
        if (style == "sequence" and _sp(recipe)) or few_groups(model, name, style, degrees.tp):
            rows, *columns = model.get_submodule(name).get_parameter("weight").shape
            part = math.ceil(rows / degrees.dp_shard)
            elements += max(0, min(part, rows - shard * part)) * math.prod(columns)
    sent = elements * _reduced_element(recipe)
    yield Traffic("tp", "all_reduce", "gradients in parts", min(elements, 1), sent)


def _batch(recipe: Recipe, degrees: Degrees, data_rank: int) -> Iterator[Traffic]:
    """Tokens and targets as int64, documents as int32, the cursor as int64, and two numbers more."""
    positions = sum(micro_batches(recipe, degrees)) * recipe.train.seq_len
    lanes = len(owned_lanes(_lanes(recipe), data_rank, degrees.data))
    cursor = new_cursor(lanes, len(recipe.data.mix) or 1).nbytes
    yield Traffic("tp", "broadcast", "batch", 1, (8 + 8 + 4) * positions + cursor + 2 * 8)


def _weights_and_gradients(
    recipe: Recipe, degrees: Degrees, model: nn.Module, styles: dict[str, Style]
) -> Iterator[Traffic]:
    """FSDP's, unit by unit. zero 0 is a mesh whose dp_shard is 1: its units are only reduced."""
    zero, element, sum_element = recipe.parallel.zero, _element(recipe), _reduced_element(recipe)
    count = len(micro_batches(recipe, degrees))
    units = units_of(model, llama_units(recipe.model))
    placed = {
        id(parameter): placement_of(model, name, style, degrees.tp)
        for name, style in styles.items()
        for parameter in model.get_submodule(name).parameters()
    }
    for unit in units:
        parameters = {id(p): p for module in unit for p in module.parameters()}
        elements = sum(_padded(p.shape, placed[key], degrees) for key, p in parameters.items())
        if degrees.dp_shard > 1:
            forward = count if zero >= 2 else 1
            # The last unit makes the loss together with its gradients, and an embedding is read by index.
            again = zero == 3 and unit is not units[-1] and not isinstance(unit[0], nn.Embedding)
            reduced = count if zero >= 2 else 1
            yield Traffic("dp_shard", "all_gather", "weights", forward, forward * elements * element)
            if again:
                yield Traffic("dp_shard", "all_gather", "weights again", count, count * elements * element)
            sent = reduced * elements * sum_element
            yield Traffic("dp_shard", "reduce_scatter", "gradients", reduced, sent)
        if degrees.dp_replicate > 1:
            part = elements // degrees.dp_shard
            yield Traffic("dp_replicate", "all_reduce", "gradients", 1, part * sum_element)


def _padded(shape: torch.Size, placement: Placement, degrees: Degrees) -> int:
    """Elements of a tensor-parallel peer's part, its dim 0 filled up to equal shards, as FSDP does it."""
    part = list(shape)
    if isinstance(placement, Shard):
        part[placement.dim] //= degrees.tp
    part[0] = math.ceil(part[0] / degrees.dp_shard) * degrees.dp_shard
    return math.prod(part)
