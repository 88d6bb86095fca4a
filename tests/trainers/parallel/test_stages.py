"""How layers are dealt to the stages of a pipeline, and the parts that they make of a model."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.trainers.tiny import tiny_recipe
from trainwright.configs.schema import ModelConfig
from trainwright.models.llama import Llama
from trainwright.trainers.parallel.stages import (
    Stages,
    deal_layers,
    head_in_layers,
    layers_of_rank,
    stages_of_rank,
)


@pytest.mark.parametrize(
    ("layers", "stages", "head", "counts"),
    [
        (8, 1, 3.0, [8]),
        (8, 4, 0.0, [2, 2, 2, 2]),
        (8, 2, 1.0, [4, 4]),
        (8, 2, 1.5, [5, 3]),
        (6, 2, 1.3, [4, 2]),
        (9, 4, 0.0, [2, 2, 2, 3]),
        (10, 4, 0.3, [2, 3, 3, 2]),
        (4, 4, 9.0, [1, 1, 1, 1]),
        (32, 8, 2.0, [4, 4, 4, 4, 4, 4, 5, 3]),
    ],
)
def test_layers_of_stages(layers: int, stages: int, head: float, counts: list[int]):
    assert [len(dealt) for dealt in deal_layers(layers, stages, head)] == counts


@given(layers=st.integers(1, 40), stages=st.integers(1, 10), head=st.floats(0, 12))
def test_all_layers_are_dealt_and_none_has_more_work_than_it_must(layers: int, stages: int, head: float):
    stages = min(stages, layers)
    dealt = deal_layers(layers, stages, head)
    assert [layer for stage in dealt for layer in stage] == list(range(layers))
    counts = list(map(len, dealt))
    assert min(counts) >= 1
    most = max((*counts[:-1], counts[-1] + head))
    if stages > 1:  # the best of every number of layers that the last stage might have
        others = stages - 1
        assert most == min(
            max(math.ceil((layers - k) / others), k + head) for k in range(1, layers - others + 1)
        )


def test_stages_go_round_the_ranks():
    assert [list(stages_of_rank(rank, 2, 3)) for rank in range(2)] == [[0, 2, 4], [1, 3, 5]]
    assert list(stages_of_rank(1, 2, 1)) == [1]


def test_a_head_is_worth_what_it_multiplies():
    llama_8b = ModelConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    assert head_in_layers(llama_8b) == pytest.approx(2.41, abs=0.01)


def test_the_ranks_have_all_parameters_under_their_own_names():
    recipe = tiny_recipe("model.num_hidden_layers=5", "model.tie_word_embeddings=false")
    recipe.parallel.pp_schedule = "interleaved_1f1b"
    names = []
    for rank in range(2):
        model = Stages(Llama(recipe.model, layers=own) for own in layers_of_rank(recipe, rank, 2))
        names += [name for name, _ in model.named_parameters()]
        assert len(list(model.parameters())) == len(list(model.named_parameters()))
    assert sorted(names) == sorted(name for name, _ in Llama(recipe.model).named_parameters())


def test_a_part_after_another_is_the_whole():
    recipe = tiny_recipe("model.num_hidden_layers=3", "model.tie_word_embeddings=false")
    whole = Llama(recipe.model)
    for weight in whole.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    parts = [Llama(recipe.model, layers=layers) for layers in (range(2), range(2, 3))]
    for part in parts:
        part.load_state_dict({name: whole.state_dict()[name] for name in part.state_dict()})
    tokens = torch.randint(0, 64, (2, 8))
    hidden = parts[0](tokens, targets=tokens)
    assert hidden.shape == (2, 8, 16)
    for targets in None, tokens:
        assert torch.equal(parts[1](tokens, targets=targets, hidden=hidden), whole(tokens, targets=targets))
