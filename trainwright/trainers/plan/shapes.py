"""The parameters that a rank computes with, unit by unit: their shapes, from the model on the meta device."""

import math
from dataclasses import astuple, replace
from typing import Any, NamedTuple

import torch
from torch.distributed.tensor import Shard

from trainwright.configs.degrees import Degrees
from trainwright.configs.schema import ModelConfig, Recipe
from trainwright.models.llama import Embedding, Head, Llama
from trainwright.models.llama_plan import llama_plan, llama_units
from trainwright.trainers.parallel.plan import styles_of, units_of
from trainwright.trainers.parallel.stages import layers_of_rank
from trainwright.trainers.parallel.tensor_parallel import placement_of

EMBEDDING, LAYER, HEAD = "embedding", "layer", "head"


class Unit(NamedTuple):
    """What data-parallel ranks gather at a time, as a tensor-parallel peer has it.

    kind: one of those above; tied embeddings stand in the head. shapes: of the parameters. elements: of all of
    them; largest: of the largest one.
    """

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    elements: int
    largest: int

    def padded(self, shards: int) -> int:
        """The elements with dim 0 of each filled up to a multiple of `shards`, as FSDP does it."""
        return sum(math.ceil(rows / shards) * shards * math.prod(rest) for rows, *rest in self.shapes)


_made: dict[tuple[Any, ...], dict[str, Unit]] = {}  # a search asks for the same ones thousands of times


def unit_kinds(config: ModelConfig, tp: int) -> dict[str, Unit]:
    """The units of a Llama by kind; all its layers are alike.

    Raises:
        ValueError: the sharding plan misses a module of the model, or names one that isn't there.
    """
    key = (astuple(config), tp)
    if key not in _made:
        _made[key] = {unit.kind: unit for unit in _units_of_one_layer(config, tp)}
    return _made[key]


def units_of_layers(config: ModelConfig, layers: range, tp: int) -> list[Unit]:
    """The units of the part of a Llama that has these layers, in the order of its forward pass."""
    kinds = unit_kinds(config, tp)
    units = [kinds[LAYER]] * len(layers)
    if layers.start == 0 and EMBEDDING in kinds:
        units.insert(0, kinds[EMBEDDING])
    if layers.stop == config.num_hidden_layers:
        units.append(kinds[HEAD])
    return units


def _units_of_one_layer(config: ModelConfig, tp: int) -> list[Unit]:
    with torch.device("meta"):
        model = Llama(replace(config, num_hidden_layers=1))
    shapes: dict[int, tuple[int, ...]] = {}
    for name, style in styles_of(model, llama_plan(config)).items():
        placement = placement_of(model, name, style, tp)
        for parameter in model.get_submodule(name).parameters(recurse=False):
            shape = list(parameter.shape)
            if isinstance(placement, Shard):
                shape[placement.dim] //= tp
            shapes[id(parameter)] = tuple(shape)
    found = []
    for modules in units_of(model, llama_units(config)):
        parameters = {id(p) for module in modules for p in module.parameters()}
        heads = any(isinstance(module, Head) for module in modules)
        kind = HEAD if heads else EMBEDDING if isinstance(modules[0], Embedding) else LAYER
        own = tuple(shape for key, shape in shapes.items() if key in parameters)
        sizes = [math.prod(shape) for shape in own]
        found.append(Unit(kind, own, sum(sizes), max(sizes)))
    return found


def ranks_that_differ(recipe: Recipe, degrees: Degrees) -> list[int]:
    """The places of a pipeline that have the most to keep or to do: first, last, first with the most layers.

    The later ones of as many layers keep fewer micro-batches, and do as much.
    """
    if degrees.pp == 1:
        return [0]
    layers = [sum(map(len, layers_of_rank(recipe, rank, degrees.pp))) for rank in range(degrees.pp)]
    return sorted({0, layers.index(max(layers)), degrees.pp - 1})
