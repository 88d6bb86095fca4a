"""The stages of a pipeline: which layers each has, and the parts of a model that a rank has."""

from collections.abc import Iterator

from torch import nn
from torch.nn import Parameter

from trainwright.configs.degrees import stages_per_rank
from trainwright.configs.schema import ModelConfig, Recipe
from trainwright.models.storage import head_dim, kv_heads


def stages_of_rank(rank: int, ranks: int, per_rank: int) -> range:
    """The stages of a rank of the pipeline: they go round the ranks, as the schedules have it."""
    return range(rank, ranks * per_rank, ranks)


def deal_layers(layers: int, stages: int, head: float) -> list[range]:
    """The layers of each stage, in order, so that the one with the most work has as little as can be.

    head: the work of the last stage's head, in layers; a lookup in the embedding is none. Every stage has a
    layer. Of stages with equally much to do the later ones get more, for the earlier ones keep the activations
    of more micro-batches.
    """
    assert stages <= layers
    work = [1.0] * (stages - 1) + [1.0 + head]
    counts = [1] * stages
    for _ in range(layers - stages):
        least = min(range(stages), key=lambda stage: (work[stage], -stage))
        work[least] += 1
        counts[least] += 1
    ends = [sum(counts[: stage + 1]) for stage in range(stages)]
    return [range(end - count, end) for end, count in zip(ends, counts, strict=True)]


def head_in_layers(config: ModelConfig) -> float:
    """The work of a Llama's head in layers, by the elements of their matrices and norms."""
    hidden, head = config.hidden_size, head_dim(config)
    attention = 2 * hidden * head * (config.num_attention_heads + kv_heads(config))
    layer = attention + 3 * hidden * config.intermediate_size + 2 * hidden
    return config.vocab_size * hidden / layer


def layers_of_rank(recipe: Recipe, rank: int, ranks: int) -> list[range]:
    """The layers of each stage that a rank of the pipeline has."""
    per_rank = stages_per_rank(recipe.parallel)
    model = recipe.model
    dealt = deal_layers(model.num_hidden_layers, ranks * per_rank, head_in_layers(model))
    return [dealt[stage] for stage in stages_of_rank(rank, ranks, per_rank)]


class Stages(nn.ModuleList):
    """A rank's parts of a model, in order; their parameters have the names that the whole model gives them."""

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Parameter]]:
        """Those of all parts."""
        for part in self:
            yield from part.named_parameters(prefix, recurse, remove_duplicate)


def parts_of(model: nn.Module) -> list[nn.Module]:
    """The parts that a rank has of a model: those of its stages, or the whole."""
    return list(model) if isinstance(model, Stages) else [model]
