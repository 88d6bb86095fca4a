"""Memory by arithmetic: worked out by hand for a tiny model, and what the keys of a recipe change in it."""

import pytest

from tests.trainers.plan.toy import TINY, planned
from trainwright.configs.degrees import Degrees
from trainwright.models import cross_entropy
from trainwright.trainers.plan.activations import head_memory, layer_memory, widths
from trainwright.trainers.plan.memory import Memory, memory_of
from trainwright.trainers.plan.shapes import ranks_that_differ, units_of_layers

ONE = "parallel.dp_shard=1 platform=cpu"
TWO = "parallel.dp_shard=2 platform=cuda"
PARAMETERS = 7248
WIDE = "model.intermediate_size=512"  # which four tensor-parallel peers can part


def memory(degrees: Degrees, *words: str, pp_rank: int = 0) -> Memory:
    return memory_of(planned(*TINY, *words), degrees, pp_rank)


def test_one_process_by_hand():
    # 32 positions in fp32. A layer keeps 35,584 bytes: two inputs of norms and two of projections of the hidden
    # size (4 x 2,048), a number a position of each norm (256), q, k and v (6,144), q and k rotated (4,096), the
    # mask as numbers (2,048), the sums of attention (512) and its result (2,048), gate and up (8,192), and
    # what down reads (4,096). The batch takes 20 x 64, rotary tables 512, the mask 512.
    # It is the most in the second micro-batch, when the second layer's backward pass has five values of the
    # feed-forward's width and the residual's gradient (22,528), and the gradient of gate and up (4,096).
    assert memory(Degrees(), ONE) == Memory(
        weights=4 * PARAMETERS,
        gathered=0,
        gradients=4 * PARAMETERS + 4 * 1024,
        optimizer=8 * PARAMETERS,
        activations=2 * 35584 + 22528 + 1280 + 512 + 512,
        logits=0,
    )


def test_fsdp_by_hand():
    # One micro-batch. When the second layer's backward pass is at its most, its weights are whole, the first
    # layer's are being gathered, what the head's gradients were reduced from is still there, and the gradient
    # of gate and up has been made. Attention has no mask here.
    layer, head = 4 * 2592, 4 * 1040
    assert memory(Degrees(dp_shard=2), TWO) == Memory(
        weights=4 * PARAMETERS // 2,
        gathered=layer + layer + head + 4 * 1024,
        gradients=head // 2,
        optimizer=8 * PARAMETERS // 2,
        activations=2 * (35584 - 2048) + 22528 + 640 + 512,
        logits=0,
    )


def test_the_head_by_hand(monkeypatch: pytest.MonkeyPatch):
    # Logits of 32 positions and 64 words, in fp32: of the model, then of the softmax as well; two values of the
    # hidden size and the norm's numbers are kept, and what the head reads is there besides.
    recipe = planned(*TINY, ONE)
    head = head_memory(widths(recipe, Degrees()), tp=1)
    assert head.work == (3 * 2048 + 128, 0, 2 * 4 * 32 * 64)
    assert (head.kept, head.gradient) == (2 * 2048 + 128, 4 * 64 * 16)
    # Half of the positions at a time: the weight's gradient so far is there, and the half before's.
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", 16 * 64)
    assert head_memory(widths(recipe, Degrees()), tp=1).work == (3 * 2048 + 128, 4096, 3 * 4 * 16 * 64)
    # In bf16 products are added up in fp32, and both are there for a moment.
    low = planned(*TINY, ONE, "precision=mixed")
    assert head_memory(widths(low, Degrees()), tp=1).gradient == 4 * 64 * 16
    # A part of the vocabulary is exponentiated where it stands.
    cut = planned(*TINY, "parallel.dp_shard=1 parallel.tp=2", WIDE)
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", 1 << 23)
    assert head_memory(widths(cut, Degrees(tp=2)), tp=2).work[2] == 4 * 32 * 32


@pytest.mark.parametrize(
    ("precision", "weights", "gradients", "optimizer"),
    [("fp32", 4, 4, 8), ("mixed", 6, 4, 8), ("bf16", 2, 4, 4), ("bf16_sr", 2, 4, 4)],
)
def test_bytes_a_parameter_in_one_process(precision: str, weights: int, gradients: int, optimizer: int):
    # The vocabulary is so large that nothing matters beside it.
    words = f"model.vocab_size=1000000 precision={precision} train.seq_len=2"
    wide = planned(*TINY, ONE, words)
    parameters = sum(unit.elements for unit in units_of_layers(wide.model, range(2), 1))
    found = memory_of(wide, Degrees())
    assert (found.weights, found.optimizer) == (weights * parameters, optimizer * parameters)
    assert found.gradients >= gradients * parameters  # those of two micro-batches
    once = memory_of(planned(*TINY, ONE, words, "train.micro_batch_size=4"), Degrees())
    assert once.gradients < found.gradients


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "mixed", "bf16_sr"])
def test_a_higher_zero_never_takes_more(zero: int, precision: str):
    def total(zero: int, micro: int) -> int:
        words = f"parallel.zero={zero} precision={precision} train.micro_batch_size={micro} platform=cuda"
        degrees = Degrees(dp_replicate=8) if zero == 0 else Degrees(dp_shard=8)
        big = "model.vocab_size=4096 model.num_hidden_layers=12 train.global_batch_size=64 parallel.dp_shard=8"
        return memory(degrees, words, big).total

    if zero < 3:
        assert total(zero + 1, 1) <= total(zero, 1)
        assert total(zero + 1, 2) <= total(zero, 2)


def test_shards_are_filled_up():
    whole = memory(Degrees(dp_shard=2), TWO)
    odd = memory(Degrees(dp_shard=3), "parallel.dp_shard=3 platform=cuda train.global_batch_size=6")
    # Rows: of 64 there are 66, of 48 and 1,024 as many, of 16 there are 18.
    units = units_of_layers(planned(*TINY, TWO).model, range(2), 1)
    assert odd.weights == sum(unit.padded(3) for unit in units) * 4 // 3
    assert odd.weights > whole.weights * 2 // 3


def test_what_checkpointing_keeps():
    def layer(*words: str) -> tuple[int, int]:
        recipe = planned(*TINY, TWO, *words)
        return layer_memory(recipe, widths(recipe, Degrees(dp_shard=2)))[:2]

    none, (full, again) = layer(), layer("train.activation_checkpointing=full")
    assert none == (35584 - 2048, 0)
    assert (full, full + again) == (2048, none[0])
    # The input, qkv (6,144), o (2,048), gate and up (8,192), attention's result and sums (2,560).
    kept, rest = layer("train.activation_checkpointing=selective")
    assert kept == 2048 + 6144 + 2048 + 8192 + 2560
    assert kept + rest == none[0] + 2048  # o's result is only kept because it is a product
    assert (
        layer("train.activation_checkpointing=selective", "train.recompute_keep=[qkv_proj]")[0] == 2048 + 6144
    )


def test_sequence_parallelism_cuts_what_lies_between_the_layers():
    def layer(*words: str) -> int:
        recipe = planned(*TINY, "parallel.dp_shard=1 parallel.tp=2 platform=cuda", WIDE, *words)
        return layer_memory(recipe, widths(recipe, Degrees(tp=2))).kept

    # Both norms' inputs and numbers on half of the positions.
    assert layer("parallel.sp=false") - layer() == (2 * 2048 + 256) // 2


def test_few_key_and_value_heads_are_shared_and_not_cut():
    recipe = planned(*TINY, "parallel.dp_shard=1 parallel.tp=4 model.num_key_value_heads=2", WIDE)
    on = widths(recipe, Degrees(tp=4))
    assert (on.queries, on.keys) == (4, 4)
    (embedding, layer, _, _) = units_of_layers(recipe.model, range(2), 4)
    assert embedding.elements == 1024 // 4
    assert (32, 16) in layer.shapes  # all of qkv: two groups of two heads, a key and a value


@pytest.mark.parametrize(("rank", "in_flight"), [(0, 2), (1, 1)])
def test_a_pipeline_keeps_what_is_in_flight(rank: int, in_flight: int):
    words = "parallel.pp=2 parallel.dp_shard=1 platform=cuda train.micro_batch_size=1"
    alone = planned(*TINY, words)
    # Four micro-batches of 16 positions; a layer on each rank. Each keeps what it receives of all of them.
    kept = layer_memory(alone, widths(alone, Degrees(pp=2))).kept
    found = memory(Degrees(pp=2), words, pp_rank=rank)
    received = 4 * 1024
    batch = 20 * 64 + 512
    sent = 1024 if rank == 0 else 0
    assert in_flight * kept <= found.activations - received - batch
    assert found.activations - received - batch <= in_flight * (kept + sent) + 12000 + kept // 2


def test_interleaved_stages_are_both_counted():
    words = "parallel.pp=2 parallel.pp_schedule=interleaved_1f1b parallel.dp_shard=1 model.num_hidden_layers=4"
    found = memory(Degrees(pp=2), words)
    assert found.weights == 4 * (1024 + 2 * 2592)


def test_as_many_micro_batches_as_one_likes():
    few, many = (
        memory(Degrees(), ONE, f"train.global_batch_size={rows}", "platform=cuda") for rows in (8, 800)
    )
    assert many == few


def test_bf16_gradients_are_added_up_in_fp32():
    # It is the most in the last micro-batch, whose head is so wide; those before have been added up by then.
    words = "model.vocab_size=100000 train.seq_len=2 parallel.zero=2 precision=bf16_sr platform=cuda"

    def gradients(rows: int) -> int:
        recipe = planned(*TINY, words, f"parallel.dp_shard=2 train.global_batch_size={rows}")
        return memory_of(recipe, Degrees(dp_shard=2)).gradients

    parameters = 2 * 100_000 * 16
    assert gradients(8) == pytest.approx(2 * parameters / 2, rel=0.01)
    assert gradients(12) == pytest.approx(4 * parameters / 2, rel=0.01)


def test_the_ranks_of_a_pipeline_that_matter():
    # Layers of equal work, and a head of about one: the last rank has fewer.
    deep = planned(
        *TINY, "parallel.pp=4 parallel.dp_shard=1 model.num_hidden_layers=14 train.micro_batch_size=1"
    )
    assert ranks_that_differ(deep, Degrees(pp=4)) == [0, 1, 3]
    assert ranks_that_differ(deep, Degrees()) == [0]
