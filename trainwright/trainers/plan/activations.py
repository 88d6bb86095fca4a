"""What one micro-batch's activations take on a rank: what its passes keep and work on, by the modules' shapes.

It follows what each module's forward pass saves for its backward pass (`models/llama.py` and what it calls) and
what activation checkpointing keeps of it (`trainers/recompute.py`). Sizes are bytes.
"""

from collections.abc import Iterator
from typing import NamedTuple

from trainwright.configs.degrees import Degrees
from trainwright.configs.projections import ADDED, projections
from trainwright.configs.schema import Recipe
from trainwright.models import cross_entropy
from trainwright.models.attention import Blockwise
from trainwright.models.blockwise_attention import KEPT_LENGTH, ROWS
from trainwright.models.storage import head_dim, kv_heads
from trainwright.trainers.parallel.traffic import micro_batches
from trainwright.trainers.platform.choose import PLATFORMS
from trainwright.trainers.precision import PRECISIONS

FP32 = 4


class Widths(NamedTuple):
    """A micro-batch on a tensor-parallel peer: its positions, and how wide each value is there, in elements.

    own: the positions that the peer has between the cut layers. keys: the width of its keys, as of its values.
    inner: of its gate, as of its up. words: those of its part of the vocabulary. element: bytes in compute.
    """

    rows: int
    length: int
    own: int
    hidden: int
    queries: int
    keys: int
    head: int
    inner: int
    words: int
    element: int

    @property
    def positions(self) -> int:
        """Of the whole micro-batch."""
        return self.rows * self.length

    @property
    def gathered(self) -> int:
        """Bytes of a value of the hidden size at all positions."""
        return self.positions * self.hidden * self.element

    @property
    def residual(self) -> int:
        """Bytes of the same at the peer's own positions."""
        return self.own * self.hidden * self.element

    def of(self, width: int) -> int:
        """Bytes of a value so wide at all positions."""
        return self.positions * width * self.element


def widths(recipe: Recipe, degrees: Degrees) -> Widths:
    """Those of the largest micro-batch of a rank."""
    model, tp = recipe.model, degrees.tp
    rows, length = max(micro_batches(recipe, degrees)), recipe.train.seq_len
    head = head_dim(model)
    return Widths(
        rows=rows,
        length=length,
        own=rows * length // (1 if recipe.parallel.sp is False else tp),
        hidden=model.hidden_size,
        queries=model.num_attention_heads * head // tp,
        keys=max(kv_heads(model) // tp, 1) * head,  # peers share a head where there are fewer
        head=head,
        inner=model.intermediate_size // tp,
        words=model.vocab_size // tp,
        element=PRECISIONS[recipe.precision.mode].computes_in.itemsize,
    )


class Kernel(NamedTuple):
    """What attention saves beside queries, keys, values and its result.

    saved: of each layer. mask: once for all layers; copied: of it, by each layer. repeats: keys and values are
    repeated for every query head. kept: whether selective checkpointing can keep its result.
    """

    saved: int
    mask: int
    copied: int = 0
    repeats: bool = False
    kept: bool = True


def planned_platform(recipe: Recipe) -> str:
    """The platform that a plan is for: the recipe's, or its cluster's."""
    return recipe.cluster.platform if recipe.platform == "auto" else recipe.platform


def attention_kernel(recipe: Recipe, on: Widths) -> Kernel:
    """The kernel that the platform trains with (`models/attention.py`)."""
    kind, masked = PLATFORMS[planned_platform(recipe)].attention, recipe.data.document_mask
    log_sums = FP32 * on.positions * on.queries // on.head
    square = on.positions * on.length if masked else 0
    if kind == "flex":
        return Kernel(log_sums, 0)
    if kind == "blockwise":
        full = on.element == FP32 and Blockwise.shortest < on.length <= KEPT_LENGTH
        if on.length >= Blockwise.shortest if masked else full:
            probabilities = _pairs(on.length) * on.rows * on.queries // on.head * FP32
            keeps = on.length <= KEPT_LENGTH
            return Kernel(probabilities if keeps else 0, 8 * on.positions if masked else 0, kept=not keeps)
    # A mask of truth values becomes one of numbers in each layer.
    return Kernel(log_sums, square, square * on.element, repeats=on.keys < on.queries)


def _pairs(length: int) -> int:
    """Of queries and keys that blockwise attention looks at, in a sequence of one document."""
    blocks, rest = divmod(length, ROWS)
    return ROWS**2 * blocks * (blocks + 1) // 2 + rest * length


class Value(NamedTuple):
    """A value of a layer's forward pass. word: what keeps it under selective checkpointing.

    saved: whether the backward pass needs it.
    """

    size: int
    word: str | None = None
    saved: bool = True


INPUT = "input"  # the word of what every mode keeps


def _values(recipe: Recipe, on: Widths, kernel: Kernel) -> Iterator[Value]:
    """Those of a layer that are saved or may be kept; `models/llama.py` in its order."""
    coalesce = recipe.model.coalesce
    yield Value(
        on.residual, INPUT
    )  # of the first norm, which with the second keeps a number a position besides
    yield Value(2 * FP32 * on.own)
    yield Value(on.gathered)  # what the projections to queries, keys and values read
    rotated = on.of(on.queries + on.keys)
    if coalesce:  # values are a part of its result
        yield Value(on.of(on.queries + 2 * on.keys), "qkv_proj", saved=not kernel.repeats)
    else:
        yield Value(on.of(on.queries), "q_proj", saved=False)
        yield Value(on.of(on.keys), "k_proj", saved=False)
        yield Value(on.of(on.keys), "v_proj", saved=not kernel.repeats)
    yield Value(on.of(3 * on.queries) if kernel.repeats else rotated)
    yield Value(kernel.copied)
    yield Value(kernel.saved, "attention")
    yield Value(on.of(on.queries), "attention")
    yield Value(on.gathered, "o_proj", saved=False)
    yield Value(on.residual)
    yield Value(on.gathered)  # what gate and up read
    if coalesce:
        yield Value(on.of(2 * on.inner), "gate_up_proj")
    else:
        yield Value(on.of(on.inner), "gate_proj")
        yield Value(on.of(on.inner), "up_proj")
        yield Value(on.of(on.inner))  # silu(gate)
    yield Value(on.of(on.inner))  # what down_proj reads


class Layer(NamedTuple):
    """kept: from a layer's forward pass to its backward pass. again: made again by the latter.

    work: the most that it has besides, in the feed-forward: five values of the inner width, or three where gate
    and up are apart, and the gradient of the residual stream.
    deferred: what a zero-bubble schedule keeps for the weights' gradients.
    """

    kept: int
    again: int
    work: int
    deferred: int


def layer_memory(recipe: Recipe, on: Widths) -> Layer:
    """A layer's activations under the recipe's activation checkpointing."""
    train, kernel = recipe.train, attention_kernel(recipe, on)
    values = list(_values(recipe, on, kernel))
    words = {INPUT, *train.recompute_keep}
    if "matmul" in words:
        words |= {*projections(recipe.model.coalesce)}
    if not kernel.kept:
        words -= {"attention"}
    if train.activation_checkpointing == "full":
        words = {INPUT}
    saved = sum(value.size for value in values if value.saved)
    kept = sum(value.size for value in values if value.word in words)
    again = sum(value.size for value in values if value.saved and value.word not in words)
    if train.activation_checkpointing == "none":
        kept, again = saved, 0
    work = on.residual + on.of(on.inner) * (5 if recipe.model.coalesce else 3)
    inputs = 2 * on.gathered + on.of(on.queries + on.inner)
    results = on.of(on.queries + 2 * on.keys + 2 * on.inner) + len(ADDED) * on.gathered
    return Layer(kept, again, work, inputs + results)


class Head(NamedTuple):
    """kept: activations from the head's forward pass to its backward pass. gradient: its weight's, likewise.

    work: activations, gradients and logits of the forward pass when they are the most together.
    """

    kept: int
    gradient: int
    work: tuple[int, int, int]


def head_memory(on: Widths, tp: int) -> Head:
    """The final norm, the head and its loss, a chunk of positions at a time (`models/cross_entropy.py`)."""
    chunk = min(on.positions, max(1, cross_entropy.CHUNK_ELEMENTS // on.words))
    chunks = -(-on.positions // chunk)
    logits, table = chunk * on.words, on.words * on.hidden
    low = on.element < FP32
    softmax = (FP32 if tp > 1 else 2 * FP32) + (on.element if low else 0)
    before = on.element if chunks > 1 else 0  # the last chunk's, until this one's takes its name
    added = FP32 if chunks > 1 else on.element
    # The second product meets a first total that isn't fp32 yet.
    adding = 2 * on.element + 2 * FP32 if low and chunks > 1 else added
    kept = on.residual + FP32 * on.own + on.gathered
    activations = kept + on.gathered + (on.residual if on.own < on.positions else 0)
    moments = [
        (activations, table * (added if chunks > 1 else 0), logits * (softmax + before)),
        (activations, table * adding, logits * on.element),
    ]
    return Head(kept, table * added, max(moments, key=sum))
