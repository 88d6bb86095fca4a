"""How the axes of a mesh lie on the machines, and how long their collectives take over the links there.

A rank's number counts through the axes from the outermost, pp, to the innermost, tp, and nodes have ranks in a
row. Gathers and reduce-scatters go in a ring through all ranks of a group, which passes each node once, and
all-reduces and broadcasts have the latency of trees over nodes, as NCCL's do. A node's network is shared by as
many groups as have ranks there. Large messages are limited by bytes, small ones by hops.
"""

import math
from typing import NamedTuple

from trainwright.configs.degrees import Degrees
from trainwright.configs.schema import ClusterConfig
from trainwright.trainers.parallel.traffic import SEND, Traffic, crossing

GROUP, NODE, NETWORK = "group", "node", "network"
TREES = {"all_reduce": 2, "broadcast": 1}  # how often a value goes through the tree
GB, US = 1e9, 1e-6


class Span(NamedTuple):
    """How the ranks of one group of an axis lie.

    stride: from one's number to the next one's. together: how many are on each node. link: the slowest between.
    """

    size: int
    stride: int
    together: int
    link: str

    @property
    def nodes(self) -> int:
        """That it spans."""
        return math.ceil(self.size / self.together)


def span(axis: str, degrees: Degrees, cluster: ClusterConfig) -> Span:
    """How a group of `axis` lies on `cluster`; `world` is all ranks, `peers` those with the same sequences."""
    size, stride = math.prod(degrees), 1
    if axis in degrees._fields:
        size, place = getattr(degrees, axis), degrees._fields.index(axis)
        stride = math.prod(degrees[place + 1 :])
    elif axis == "peers":  # neighbours in the tensor-parallel group, and as many again in each stage
        size = degrees.tp * degrees.pp
    assert cluster.ranks_per_node is not None
    reach = size * stride if axis != "peers" else math.prod(degrees)
    if reach <= (cluster.ranks_per_group or 1):
        return Span(size, stride, size, GROUP)
    if reach <= cluster.ranks_per_node:
        return Span(size, stride, size, NODE)
    return Span(size, stride, max(1, min(size, cluster.ranks_per_node // stride)), NETWORK)


def seconds(traffic: Traffic, degrees: Degrees, cluster: ClusterConfig) -> float:
    """How long collectives take, one after the other, if nothing else goes over the links."""
    on = span(traffic.axis, degrees, cluster)
    crosses = crossing(traffic.kind, on.size, traffic.bytes)
    return _by_bytes(crosses, traffic.kind, on, cluster) + traffic.calls * _hops(traffic.kind, on, cluster)


def _by_bytes(crosses: int, kind: str, on: Span, cluster: ClusterConfig) -> float:
    rates = {GROUP: cluster.group_gb_s or cluster.node_gb_s, NODE: cluster.node_gb_s}
    own = crosses / ((rates.get(on.link) or cluster.node_gb_s or math.inf) * GB * cluster.reached)
    if on.link != NETWORK:
        return own
    assert cluster.ranks_per_node is not None
    assert cluster.network_gb_s is not None
    # Of a pipeline's ranks on a node those send on whose next stage is on another.
    sharing = min(on.stride, cluster.ranks_per_node) if kind == SEND else cluster.ranks_per_node / on.together
    shared = crosses * sharing / (cluster.network_gb_s * GB * cluster.reached)
    return max(own if on.together > 1 else 0.0, shared)


def _hops(kind: str, on: Span, cluster: ClusterConfig) -> float:
    """The latency of one call."""
    near, far = cluster.node_latency_us * US, cluster.network_latency_us * US
    if kind == SEND:
        return far if on.link == NETWORK else near
    if kind in TREES:
        return TREES[kind] * (math.ceil(math.log2(on.nodes)) * far + (on.together - 1) * near)
    return (on.nodes - 1) * far + (on.size - on.nodes) * near
