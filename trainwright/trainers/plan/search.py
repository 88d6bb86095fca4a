"""The layouts that a cluster can run a recipe in, by how fast they are, and why the others can't be."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from trainwright.configs.check import check_layout
from trainwright.configs.degrees import resolve_degrees
from trainwright.configs.schema import Recipe
from trainwright.errors import BadRequest
from trainwright.trainers.plan.layout import Layout
from trainwright.trainers.plan.refusals import NOT_TIMED, too_large

LARGEST_MICRO_BATCH = 8
SCHEDULES = ("1f1b", "interleaved_1f1b")
CHECKPOINTING = ("none", "selective", "full")  # each takes longer than the one before, and less memory


@dataclass(frozen=True)
class Refused:
    """A layout that can't be, in the recipe's words, and why."""

    words: str
    why: str


@dataclass(frozen=True)
class Found:
    """What was tried. fit: the fastest first. own: the recipe's place there and its layout, or why it isn't."""

    fit: list[Layout]
    refused: list[Refused]
    own: tuple[int, Layout] | Refused

    @property
    def reasons(self) -> list[tuple[str, int, str]]:
        """Kinds of reason, with how many layouts each is of and one of its sentences; the most first."""
        kinds = Counter(_kind(one.why) for one in self.refused)
        first = {_kind(one.why): one.why for one in reversed(self.refused)}
        return [(kind, count, first[kind]) for kind, count in kinds.most_common()]


def search(recipe: Recipe, ranks: int) -> Found:
    """Try every layout of `recipe` on `ranks` ranks of its cluster, and the recipe as it is written.

    Of each the least checkpointing that fits is taken; the recipe keeps its own.

    Raises:
        BadRequest: the cluster isn't described well enough to say how fast a layout is.
    """
    fit, refused = [], []
    own = _as_written(recipe, ranks)
    for candidate in candidates(recipe, ranks):
        if said := list(check_layout(candidate, [ranks])):
            refused.append(Refused(words_of(candidate), said[0]))
            continue
        degrees = resolve_degrees(candidate.parallel, ranks)
        for mode in CHECKPOINTING:
            train = replace(candidate.train, activation_checkpointing=mode)
            layout = Layout(replace(candidate, train=train), degrees)
            if layout.fits is not False:
                break
        if not layout.timed:
            raise BadRequest(NOT_TIMED)
        if layout.fits is not False:
            fit.append(layout)
        else:
            refused.append(Refused(words_of(candidate), too_large(layout)))
    if isinstance(own, Layout) and own not in fit:
        fit.append(own)
    fit.sort(key=lambda layout: layout.time.total)
    return Found(fit, refused, (fit.index(own), own) if isinstance(own, Layout) else own)


def _as_written(recipe: Recipe, ranks: int) -> Layout | Refused:
    """The recipe's own layout."""
    if said := list(check_layout(recipe, [ranks])):
        return Refused(words_of(recipe), said[0])
    degrees = resolve_degrees(recipe.parallel, ranks)
    layout = Layout(replace(recipe, parallel=replace(recipe.parallel, dp_shard=degrees.dp_shard)), degrees)
    return Refused(words_of(layout.recipe), too_large(layout)) if layout.fits is False else layout


def candidates(recipe: Recipe, ranks: int) -> Iterator[Recipe]:
    """Every mix of degrees, ZeRO level, replicas by node and micro-batch; tensor parallelism within a node."""
    per_node = recipe.cluster.ranks_per_node or ranks
    for tp in divisors(min(per_node, ranks)):
        for pp in divisors(ranks // tp):
            if pp > recipe.model.num_hidden_layers:
                continue
            data = ranks // tp // pp
            for zero, replicas in _sharding(data, max(1, per_node // tp)):
                for schedule in SCHEDULES if pp > 1 else (recipe.parallel.pp_schedule,):
                    parallel = replace(
                        recipe.parallel,
                        tp=tp,
                        pp=pp,
                        dp_replicate=replicas,
                        dp_shard=data // replicas,
                        zero=zero,
                        pp_schedule=schedule,
                        pp_stages=recipe.parallel.pp_stages
                        if schedule == recipe.parallel.pp_schedule
                        else None,
                    )
                    for size in _micro_batches(recipe.train.global_batch_size, data):
                        if zero == 2 and size * data >= recipe.train.global_batch_size:
                            continue  # of one micro-batch it does what zero 1 does
                        train = replace(recipe.train, micro_batch_size=size)
                        yield replace(recipe, parallel=parallel, train=train)


def divisors(number: int) -> list[int]:
    """All that divide it, the least first."""
    return [d for d in range(1, number + 1) if number % d == 0]


def _sharding(data: int, in_node: int) -> Iterator[tuple[int, int]]:
    """ZeRO levels with numbers of replicas: over all ranks, or over those of a node."""
    yield 1 if data == 1 else 0, 1
    if data == 1:
        return
    for zero in (1, 2, 3):
        yield zero, 1
        if 1 < in_node < data and data % in_node == 0:
            yield zero, data // in_node


def _micro_batches(batch: int, data: int) -> list[int]:
    most = min(LARGEST_MICRO_BATCH, max(1, batch // data))
    return [size for size in (1, 2, 4, 8) if size <= most and batch % size == 0]


def words_of(recipe: Recipe) -> str:
    """A layout in the recipe's keys; checkpointing isn't one."""
    parallel, train = recipe.parallel, recipe.train
    pipeline = f" parallel.pp_schedule={parallel.pp_schedule}" if parallel.pp > 1 else ""
    return (
        f"parallel.tp={parallel.tp} parallel.pp={parallel.pp}{pipeline} parallel.dp_replicate="
        f"{parallel.dp_replicate} parallel.dp_shard={parallel.dp_shard} parallel.zero={parallel.zero} "
        f"train.micro_batch_size={train.micro_batch_size}"
    )


def _kind(why: str) -> str:
    """A reason without its numbers."""
    bare = re.sub(r"=?\d[\d.,]*", "", why.split(";")[0])
    return re.sub(r" (of stage|, the most for).*", "", bare) if "GiB" in why else bare
