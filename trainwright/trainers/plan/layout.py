"""A layout of a run on a cluster: what it needs, what it sends, how long a step takes, and what limits it."""

from dataclasses import dataclass
from functools import cached_property

from trainwright.configs.degrees import Degrees
from trainwright.configs.schema import Recipe
from trainwright.errors import BadRequest
from trainwright.trainers.flops import training_flops_per_token
from trainwright.trainers.parallel.traffic import Traffic, crossing, step_traffic
from trainwright.trainers.plan.goodput_parts import parameter_count
from trainwright.trainers.plan.links import NETWORK, seconds, span
from trainwright.trainers.plan.memory import Memory, memory_of
from trainwright.trainers.plan.shapes import ranks_that_differ, unit_kinds
from trainwright.trainers.plan.step_time import StepTime, step_time
from trainwright.trainers.precision import PRECISIONS

GIB = 2**30
# What a step's time goes to, in the words that are shown.
PARTS = {
    "compute": "products",
    "again": "products made again",
    "tensor": "tensor parallelism",
    "data": "data parallelism, where products don't hide it",
    "pipeline": "sends between stages",
    "bubble": "waiting for other stages",
    "other": "small collectives of all ranks",
}


@dataclass(frozen=True)
class Layout:
    """A recipe on a mesh of `degrees`; worked out as it is asked for.

    Raises:
        BadRequest: the arithmetic doesn't know its experts, or the sharding plan isn't its own.
    """

    recipe: Recipe
    degrees: Degrees

    def __post_init__(self) -> None:
        if self.recipe.model.moe.num_local_experts is not None:
            raise BadRequest(
                "trainwright plan doesn't work out a mixture of experts (model.moe.num_local_experts) yet: "
                "plan a dense model, as that of recipe=llama2_7b"
            )
        try:
            unit_kinds(self.recipe.model, self.degrees.tp)
        except ValueError as error:
            raise BadRequest(f"{error}: mend it in trainwright/models/llama_plan.py") from error

    @property
    def ranks(self) -> int:
        """All of them."""
        return self.degrees.pp * self.degrees.data * self.degrees.tp

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        return parameter_count(self.recipe.model)

    @property
    def flops_per_token(self) -> float:
        """Of a forward and backward pass, as MFU counts them."""
        return training_flops_per_token(self.recipe.model, self.recipe.train.seq_len)

    @property
    def tokens_per_step(self) -> int:
        """Positions of the global batch."""
        return self.recipe.train.global_batch_size * self.recipe.train.seq_len

    @cached_property
    def memory(self) -> tuple[int, Memory]:
        """The place in the pipeline of the rank that needs most, and what it needs."""
        ranks = ranks_that_differ(self.recipe, self.degrees)
        of_ranks = {rank: memory_of(self.recipe, self.degrees, rank) for rank in ranks}
        return max(of_ranks.items(), key=lambda one: one[1].total)

    @property
    def room(self) -> float | None:
        """The bytes that a rank of the cluster has; None where no cluster is named."""
        cluster = self.recipe.cluster
        return None if cluster.memory_gib is None else (cluster.memory_gib - cluster.reserved_gib) * GIB

    @property
    def fits(self) -> bool | None:
        """Whether the memory is enough; None where nobody knows how much there is."""
        return None if self.room is None else self.memory[1].total <= self.room

    @cached_property
    def traffic(self) -> list[Traffic]:
        """What the rank sends that `memory` is about."""
        return step_traffic(self.recipe, self.degrees, pp_rank=self.memory[0])

    @property
    def timed(self) -> bool:
        """Whether the cluster's pace is known for this precision: a peak is that of bf16."""
        low = PRECISIONS[self.recipe.precision.mode].computes_in.itemsize == 2
        cluster = self.recipe.cluster
        return low and None not in (cluster.peak_tflops, cluster.node_gb_s, cluster.network_gb_s)

    @cached_property
    def time(self) -> StepTime:
        """Of a step, on a cluster that is known."""
        return step_time(self.recipe, self.degrees)

    @property
    def tokens_per_s(self) -> float:
        """Of all ranks together."""
        return self.tokens_per_step / self.time.total

    @property
    def mfu(self) -> float:
        """The model's operations as a share of the ranks' peak."""
        peak = (self.recipe.cluster.peak_tflops or 0.0) * 1e12
        return self.tokens_per_s * self.flops_per_token / (self.ranks * peak)

    @property
    def usd_per_billion_tokens(self) -> float | None:
        """What the nodes cost for so long; None without a price."""
        price, per_node = self.recipe.cluster.usd_per_hour, self.recipe.cluster.ranks_per_node
        if price is None or per_node is None:
            return None
        return self.ranks / per_node * price / 3600 * 1e9 / self.tokens_per_s

    @property
    def binds(self) -> str:
        """What would have to be better first: memory where it doesn't fit, else what takes most of the step."""
        if self.fits is False:
            return "memory"
        part = max(StepTime._fields, key=lambda name: getattr(self.time, name))
        axis = {
            "tensor": "tp",
            "pipeline": "pp",
            "data": "dp_shard" if self.degrees.dp_shard > 1 else "dp_replicate",
        }
        return f"{PARTS[part]}, over the {self.link(axis[part])}" if part in axis else PARTS[part]

    def link(self, axis: str) -> str:
        """The slowest link that collectives of `axis` cross."""
        if self.recipe.cluster.ranks_per_node is None:
            return ""
        link = span(axis, self.degrees, self.recipe.cluster).link
        return link if link == NETWORK else f"{link}'s links"

    def crosses(self, one: Traffic) -> int:
        """The bytes that a rank sends in these collectives."""
        sizes = self.degrees._asdict() | {"peers": self.degrees.pp * self.degrees.tp}
        return crossing(one.kind, sizes.get(one.axis, self.ranks), one.bytes)

    def takes(self, one: Traffic) -> float:
        """Seconds that these collectives take if nothing else goes over their link."""
        return seconds(one, self.degrees, self.recipe.cluster)
