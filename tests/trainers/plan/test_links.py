"""How groups of ranks lie on nodes, and how long their collectives take; by hand."""

import pytest

from tests.trainers.plan.toy import CLUSTER, TINY, planned
from trainwright.configs.degrees import Degrees
from trainwright.configs.schema import ClusterConfig
from trainwright.trainers.parallel.traffic import Traffic
from trainwright.trainers.plan.links import Span, seconds, span


def cluster(*words: str) -> ClusterConfig:
    return planned(*TINY, *CLUSTER, "parallel.dp_shard=8 train.global_batch_size=8", *words).cluster


@pytest.mark.parametrize(
    ("axis", "degrees", "expected"),
    [
        ("tp", Degrees(dp_shard=4, tp=2), Span(2, 1, 2, "node")),
        ("dp_shard", Degrees(dp_shard=4, tp=2), Span(4, 2, 2, "network")),
        ("dp_shard", Degrees(dp_replicate=2, dp_shard=4), Span(4, 1, 4, "node")),
        ("dp_replicate", Degrees(dp_replicate=2, dp_shard=4), Span(2, 4, 1, "network")),
        ("pp", Degrees(pp=2, dp_shard=4), Span(2, 4, 1, "network")),
        ("pp", Degrees(pp=4, dp_shard=2), Span(4, 2, 2, "network")),
        ("world", Degrees(dp_shard=8), Span(8, 1, 4, "network")),
    ],
)
def test_where_the_ranks_of_an_axis_are(axis: str, degrees: Degrees, expected: Span):
    assert span(axis, degrees, cluster()) == expected


def test_a_groups_own_link():
    quick = cluster("cluster.ranks_per_group=2", "cluster.group_gb_s=1000")
    assert span("tp", Degrees(dp_shard=4, tp=2), quick).link == "group"
    assert span("tp", Degrees(dp_shard=2, tp=4), quick).link == "node"
    gather = Traffic("tp", "all_gather", "activations", 1, 2 * 10**9)
    assert seconds(gather, Degrees(dp_shard=4, tp=2), quick) == pytest.approx(1e-3)


GATHER = Traffic("dp_shard", "all_gather", "weights", 1, 8 * 10**9)


@pytest.mark.parametrize(
    ("traffic", "degrees", "expected"),
    [
        # Of 8 GB each rank sends 7/8. In one node at 100 GB/s.
        (GATHER, Degrees(dp_replicate=2, dp_shard=4), 6 / 100),
        # All ranks are one group, which crosses the 10 GB/s of each node once.
        (GATHER, Degrees(dp_shard=8), 7 / 10),
        # With two tensor-parallel peers two groups do.
        (GATHER, Degrees(dp_shard=4, tp=2), 2 * 6 / 10),
        # Each rank's own all-reduce, of the whole twice a half.
        (
            Traffic("dp_replicate", "all_reduce", "gradients", 1, 10**9),
            Degrees(dp_replicate=2, dp_shard=4),
            4 * 1 / 10,
        ),
        (Traffic("pp", "send", "activations", 1, 10**9), Degrees(pp=2, dp_shard=4), 4 / 10),
    ],
)
def test_bytes_over_links(traffic: Traffic, degrees: Degrees, expected: float):
    assert seconds(traffic, degrees, cluster()) == pytest.approx(expected)


def test_hops():
    slow = cluster("cluster.node_latency_us=1", "cluster.network_latency_us=10")
    small = Traffic("dp_shard", "all_gather", "weights", 3, 0)
    # A ring through eight ranks on two nodes: seven hops, one of them over the network.
    assert seconds(small, Degrees(dp_shard=8), slow) == pytest.approx(3 * (10 + 6) * 1e-6)
    # A tree over two nodes, up and down.
    total = Traffic("world", "all_reduce", "facts of the step", 1, 0)
    assert seconds(total, Degrees(dp_shard=8), slow) == pytest.approx(2 * (10 + 3) * 1e-6)


def test_links_are_never_reached_whole():
    assert seconds(GATHER, Degrees(dp_shard=8), cluster("cluster.reached=0.5")) == pytest.approx(7 / 5)
