"""The time of a step, by hand."""

import pytest

from tests.trainers.plan.toy import CLUSTER, TINY, planned
from trainwright.configs.degrees import Degrees
from trainwright.trainers.flops import training_flops_per_token
from trainwright.trainers.plan.layout import Layout
from trainwright.trainers.plan.step_time import flops_again, layer_flops, step_time

DP = "parallel.dp_shard=8 train.global_batch_size=8 train.micro_batch_size=1 precision=mixed"
RATE = 100e12 * 0.5


def layout(degrees: Degrees, *words: str) -> Layout:
    return Layout(planned(*TINY, *CLUSTER, *words), degrees)


def test_products_are_those_that_mfu_counts():
    recipe = planned(*TINY, *CLUSTER, DP)
    layers = 2 * sum(layer_flops(recipe.model, 16).values())
    assert 3 * (layers + 2 * 64 * 16) == training_flops_per_token(recipe.model, 16)
    apart = planned(*TINY, *CLUSTER, DP, "model.coalesce=false")
    assert sum(layer_flops(apart.model, 16).values()) == layers / 2
    made = layout(Degrees(dp_shard=8), DP)
    assert made.time.compute == pytest.approx(16 * training_flops_per_token(recipe.model, 16) / RATE)


def test_a_sliding_window_is_counted_once_for_mfu_and_time():
    recipe = planned(*TINY, *CLUSTER, DP, "model.sliding_window=4")
    assert layer_flops(recipe.model, 16)["attention"] == layer_flops(recipe.model, 4)["attention"]
    layers = 2 * sum(layer_flops(recipe.model, 16).values())
    assert 3 * (layers + 2 * 64 * 16) == training_flops_per_token(recipe.model, 16)


def test_what_checkpointing_makes_again():
    def again(*words: str) -> float:
        return flops_again(planned(*TINY, *CLUSTER, DP, *words), Degrees(dp_shard=8))

    flops = layer_flops(planned(*TINY, *CLUSTER, DP).model, 16)
    assert again() == 0
    assert again("train.activation_checkpointing=selective") == 0
    assert again("train.activation_checkpointing=full") == sum(flops.values()) - flops["down_proj"]
    kept = "train.recompute_keep=[attention,qkv_proj]"
    assert again("train.activation_checkpointing=selective", kept) == flops["o_proj"] + flops["gate_up_proj"]


@pytest.mark.parametrize(("zero", "passes"), [(1, 1), (2, 4), (3, 4)])
def test_data_parallel_ranks_communicate_once_or_for_each_micro_batch(zero: int, passes: int):
    words = f"{DP} train.global_batch_size=32 parallel.zero={zero} cluster.overlap=0"
    # Weights in bf16 and gradients in fp32 cross the nodes' 10 GB/s once, seven eighths of them. Under zero 3
    # both layers are gathered again.
    weights, layers = 2 * 7248, 2 * 2 * 2592
    sent = passes * (weights + 4 * 7248 + (layers if zero == 3 else 0)) * 7 / 8
    assert step_time(planned(*TINY, *CLUSTER, words), Degrees(dp_shard=8)).data == pytest.approx(sent / 10e9)


def test_products_hide_all_but_a_units_own():
    exposed = layout(Degrees(dp_shard=8), DP, "parallel.zero=1 cluster.attainable=0.000001").time.data
    # Of four units one's gather and one's reduction.
    assert exposed == pytest.approx((2 + 4) * 7248 * 7 / 8 / 4 / 10e9)


def test_tensor_parallelism_is_never_hidden():
    words = "parallel.tp=2 parallel.dp_shard=4 precision=mixed train.micro_batch_size=1 parallel.zero=1"
    wide = layout(Degrees(dp_shard=4, tp=2), words, "model.intermediate_size=512")
    made = wide.time
    # Four gathers and four reduce-scatters a layer, one of each of the embedding and the head, of 16 x 16 bf16,
    # and three fp32 of the loss for each position; half of them cross.
    activations = 2 * (2 * 4 + 2) * 16 * 16 * 2 / 2
    loss = 3 * 16 * 4 * 2 / 2
    assert made.tensor == pytest.approx((activations + loss) / 100e9)
    assert made.compute == pytest.approx(16 * wide.flops_per_token / RATE / 2)


@pytest.mark.parametrize(("schedule", "share"), [("1f1b", 1), ("interleaved_1f1b", 2), ("zero_bubble", 3)])
def test_a_pipeline_waits(schedule: str, share: int):
    words = (
        "parallel.pp=2 parallel.dp_shard=4 precision=mixed train.global_batch_size=16 train.micro_batch_size=1"
    )
    made = layout(
        Degrees(pp=2, dp_shard=4),
        words,
        f"parallel.pp_schedule={schedule} model.num_hidden_layers=4 parallel.zero=1",
    ).time
    busy = (made.compute + made.again + made.tensor + made.pipeline) / 4
    assert made.bubble == pytest.approx(busy / share)
    assert made.pipeline > 0


def test_what_follows_from_it():
    made = layout(Degrees(dp_shard=8), DP)
    assert made.tokens_per_s == pytest.approx(8 * 16 / made.time.total)
    assert made.mfu == pytest.approx(0.5 * made.time.compute / made.time.total)
    # Two nodes at a cent a second.
    assert made.usd_per_billion_tokens == pytest.approx(0.02 * 1e9 / made.tokens_per_s)
    assert made.binds == "data parallelism, where products don't hide it, over the network"
    assert layout(Degrees(dp_shard=8), DP, "cluster.attainable=0.000001").binds == "products"
    assert layout(Degrees(dp_shard=8), DP, "cluster.memory_gib=0.00001").binds == "memory"
    assert not layout(Degrees(dp_shard=8), DP, "precision=fp32").timed


@pytest.mark.parametrize(("zero", "passes"), [(1, 1), (3, 4)])
def test_what_hides_it_is_as_many_passes(zero: int, passes: int):
    words = f"{DP} train.global_batch_size=32 parallel.zero={zero} cluster.attainable=0.001"
    apart, beside = (
        layout(Degrees(dp_shard=8), words, f"cluster.overlap={overlap}").time for overlap in (0, 0.01)
    )
    # Of four micro-batches those whose passes communicate hide a hundredth of their products' time.
    assert apart.data - beside.data == pytest.approx(0.01 * passes * apart.compute / 4)


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_replicas_are_hidden_beside_one_pass(zero: int):
    # Replicas of a node's shards sum their gradients in the last of four micro-batches. The network is so slow
    # that a hundredth of the products hides hardly anything: so much less is waited for, of one backward pass.
    words = (
        f"{DP} parallel.dp_shard=4 parallel.dp_replicate=2 train.global_batch_size=32 parallel.zero={zero} "
        "cluster.attainable=0.001 cluster.node_gb_s=1000000 cluster.network_gb_s=0.001"
    )
    apart, beside = (
        layout(Degrees(dp_replicate=2, dp_shard=4), words, f"cluster.overlap={overlap}").time
        for overlap in (0, 0.01)
    )
    assert apart.data - beside.data == pytest.approx(0.01 * apart.compute / 4 * 2 / 3, rel=0.01)
