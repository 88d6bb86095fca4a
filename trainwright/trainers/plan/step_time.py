"""How long a step takes, by what it waits for: products, links, and a pipeline's other ranks.

The assumptions, each of which docs/planning.md names:

1. Products run at `cluster.attainable` of the peak. Attention counts in full, as in `flops.py`.
2. Tensor-parallel collectives wait for products and products for them: nothing is hidden.
3. Data-parallel gathers and reductions go beside the products of their pass and are hidden by up to
   `cluster.overlap` of their time; the first gather and the last reduction never are. Replicas sum their
   gradients in the last micro-batch's backward pass only, after its shards have been reduced.
4. A pipeline's sends aren't hidden. Its ranks wait as the tables of docs/parallelism.md say, and the rank with
   the most to do sets the pace.
5. The optimizer's update, the data and elementwise work beyond what `attainable` allows for take no time, and
   no rank is slower than the others.
"""

from typing import NamedTuple

from trainwright.configs.degrees import Degrees, stages_per_rank
from trainwright.configs.projections import projections
from trainwright.configs.schema import ModelConfig, Recipe
from trainwright.models.storage import head_dim, kv_heads
from trainwright.trainers.flops import attended
from trainwright.trainers.parallel.stages import layers_of_rank
from trainwright.trainers.parallel.traffic import Traffic, micro_batches, step_traffic
from trainwright.trainers.plan.activations import attention_kernel, widths
from trainwright.trainers.plan.links import seconds
from trainwright.trainers.plan.shapes import ranks_that_differ

STEP_ONLY = ("gradients in parts", "batch", "facts of the step")  # once a step, hidden by nothing


class StepTime(NamedTuple):
    """Seconds of a step by what takes them; of the data-parallel communication what nothing hides.

    again: products that activation checkpointing makes once more. tensor, data, pipeline: collectives of these.
    bubble: a pipeline's ranks wait for others. other: small collectives of all ranks.
    """

    compute: float
    again: float = 0.0
    tensor: float = 0.0
    data: float = 0.0
    pipeline: float = 0.0
    bubble: float = 0.0
    other: float = 0.0

    @property
    def total(self) -> float:
        """Of the whole step."""
        return sum(self)


def layer_flops(model: ModelConfig, seq_len: int) -> dict[str, float]:
    """Floating-point operations of a layer's forward pass for one token: its products, and its attention."""
    hidden, head, inner = model.hidden_size, head_dim(model), model.intermediate_size
    queries, keys = model.num_attention_heads * head, kv_heads(model) * head
    together = {"qkv_proj": (hidden, queries + 2 * keys), "gate_up_proj": (hidden, 2 * inner)}
    heads = {"q_proj": (hidden, queries), "k_proj": (hidden, keys), "v_proj": (hidden, keys)}
    apart = heads | {"gate_proj": (hidden, inner), "up_proj": (hidden, inner)}
    products = (together if model.coalesce else apart) | {
        "o_proj": (queries, hidden),
        "down_proj": (inner, hidden),
    }
    attention = 4.0 * queries * attended(model, seq_len)
    return {name: 2.0 * a * b for name, (a, b) in products.items()} | {"attention": attention}


def flops_again(recipe: Recipe, degrees: Degrees) -> float:
    """Of a layer's forward pass for one token, what the backward pass makes again (`trainers/recompute.py`)."""
    train, flops = recipe.train, layer_flops(recipe.model, recipe.train.seq_len)
    if train.activation_checkpointing == "none":
        return 0.0
    kept = {projections(recipe.model.coalesce)[-1]}  # the last product is never needed again
    if train.activation_checkpointing == "selective":
        kept |= {*train.recompute_keep}
        if "matmul" in kept:
            kept |= {*projections(recipe.model.coalesce)}
        if not attention_kernel(recipe, widths(recipe, degrees)).kept:
            kept -= {"attention"}
    return sum(size for name, size in flops.items() if name not in kept)


def step_time(recipe: Recipe, degrees: Degrees) -> StepTime:
    """That of `recipe` on its cluster: of the rank of the pipeline that takes longest."""
    ranks = ranks_that_differ(recipe, degrees)
    return max((_of_rank(recipe, degrees, rank) for rank in ranks), key=lambda time: time.total)


def _of_rank(recipe: Recipe, degrees: Degrees, pp_rank: int) -> StepTime:
    cluster, model, count = recipe.cluster, recipe.model, len(micro_batches(recipe, degrees))
    assert cluster.peak_tflops is not None
    rate = cluster.peak_tflops * 1e12 * cluster.attainable * degrees.tp
    positions = widths(recipe, degrees).positions
    layers = layers_of_rank(recipe, pp_rank, degrees.pp) if degrees.pp > 1 else [range(model.num_hidden_layers)]
    number, ends = sum(map(len, layers)), layers[-1].stop == model.num_hidden_layers
    head = 2.0 * model.vocab_size * model.hidden_size if ends else 0.0
    forward = positions * (number * sum(layer_flops(model, recipe.train.seq_len).values()) + head) / rate
    again = positions * number * flops_again(recipe, degrees) / rate

    traffic = step_traffic(recipe, degrees, pp_rank=pp_rank)
    tensor = _seconds_of([t for t in traffic if t.axis == "tp" and t.what not in STEP_ONLY], recipe, degrees)
    pipeline = _seconds_of([t for t in traffic if t.axis == "pp"], recipe, degrees)
    other = _seconds_of([t for t in traffic if t.what in STEP_ONLY], recipe, degrees)
    passes = count if recipe.parallel.zero >= 2 else 1  # micro-batches whose passes gather and reduce
    shards = [t for t in traffic if t.axis == "dp_shard"]
    replicas = [t for t in traffic if t.axis == "dp_replicate"]
    data = sum(
        _exposed(each, last, passes, beside, recipe, degrees)
        for each, last, beside in (
            ([t for t in shards if t.what == "weights"], [], forward),
            ([t for t in shards if t.what != "weights"], replicas, 2 * forward + again),
        )
    )
    # Each of the ranks' waits is a part of what a micro-batch takes.
    share = 3 if recipe.parallel.pp_schedule == "zero_bubble" else 1
    waits = (degrees.pp - 1) / (stages_per_rank(recipe.parallel) * share) if degrees.pp > 1 else 0.0
    busy = 3 * forward + again + (tensor + pipeline) / count
    return StepTime(3 * count * forward, count * again, tensor, data, pipeline, waits * busy, other)


def _seconds_of(traffic: list[Traffic], recipe: Recipe, degrees: Degrees) -> float:
    return sum(seconds(one, degrees, recipe.cluster) for one in traffic)


def _exposed(
    each: list[Traffic], last: list[Traffic], passes: int, beside: float, recipe: Recipe, degrees: Degrees
) -> float:
    """What of the data-parallel communication of `passes` isn't hidden by their products.

    beside: seconds of a pass's products. each: is spread over all passes; last: comes in the last one alone.
    """
    hidden = recipe.cluster.overlap * beside
    of_a_pass, at_the_end = _seconds_of(each, recipe, degrees) / passes, _seconds_of(last, recipe, degrees)
    one_unit = sum(
        _seconds_of(some, recipe, degrees) / max(one.calls for one in some) for some in (each, last) if some
    )
    return (passes - 1) * max(0.0, of_a_pass - hidden) + max(one_unit, of_a_pass + at_the_end - hidden)
