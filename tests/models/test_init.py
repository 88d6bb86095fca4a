import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks import scaled_init as benchmark
from trainwright.configs.schema import ModelConfig
from trainwright.models import init
from trainwright.models.counter_random import key_of, normal
from trainwright.models.init import init_weights, initial_norm
from trainwright.models.llama import Llama
from trainwright.models.storage import stored_weights, whole_pieces


def initial(config: ModelConfig, seed: int = 0, **changes) -> Llama:
    config = ModelConfig(**vars(config) | changes)
    model = Llama(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    init_weights(whole_pieces(model), config, seed)
    return model


def separate(model: Llama) -> dict[str, torch.Tensor]:
    """Every separate weight by its own name."""
    return {
        name: model.get_parameter(stored) if rows is None else model.get_parameter(stored)[rows]
        for stored, weights in stored_weights(model.config)
        for name, rows, _ in weights
    }


def test_coalesced_and_separate_start_from_the_same_numbers(shape):
    one, other = (separate(initial(shape, coalesce=coalesce)) for coalesce in (True, False))
    assert one.keys() == other.keys()
    for name, weight in one.items():
        assert torch.equal(weight, other[name]), name


def test_every_value_is_set_and_norms_are_one(config):
    for name, parameter in initial(config).named_parameters():
        assert parameter.isfinite().all(), name
        assert (parameter == 1).all() == ("norm" in name), name


def test_a_value_is_a_function_of_seed_name_row_and_column(config):
    """Any part of any weight can be drawn without the rest."""
    for name, weight in separate(initial(config, seed=3)).items():
        if weight.dim() == 1:
            continue
        rows, columns = torch.tensor([2, 5, 11, weight.shape[0] - 1]), torch.arange(4, weight.shape[1] - 3)
        alone = normal(key_of(3, name), rows, columns) * config.initializer_range
        assert torch.equal(weight[rows][:, columns], alone), name


@pytest.mark.parametrize("elements", [1, 999, 10**9])
def test_how_many_rows_are_drawn_at_once_does_not_matter(config, elements, monkeypatch):
    expected = initial(config).state_dict()
    monkeypatch.setattr(init, "ELEMENTS_AT_ONCE", elements)
    for name, parameter in initial(config).state_dict().items():
        assert torch.equal(parameter, expected[name]), name


def test_another_seed_gives_other_numbers(config):
    one, other = separate(initial(config, seed=0)), separate(initial(config, seed=1))
    for name, weight in one.items():
        if weight.dim() == 2:
            equal = (weight == other[name]).double().mean()
            assert equal < 1e-3, name


def test_no_two_weights_start_alike(config):
    matrices = [weight[:8, :8].flatten() for weight in separate(initial(config)).values() if weight.dim() == 2]
    assert len({tuple(matrix.tolist()) for matrix in matrices}) == len(matrices)


@pytest.mark.parametrize("std", [0.02, 1 / 24])
def test_matrices_are_normal_with_the_configured_deviation(config, std):
    for name, weight in separate(initial(config, initializer_range=std)).items():
        if weight.dim() == 1:
            continue
        z, n = weight.detach().double().flatten() / std, weight.numel()
        assert abs(z.mean()) < 5 / math.sqrt(n), name
        assert abs(z.std() - 1) < 5 / math.sqrt(2 * n), name
        assert abs((z**4).mean() - 3) < 5 * math.sqrt(96 / n), name


def test_low_precision_starts_from_the_same_numbers_rounded(config):
    low = Llama(config).bfloat16()
    init_weights(whole_pieces(low), config, 0)
    for name, parameter in initial(config).state_dict().items():
        assert torch.equal(low.state_dict()[name], parameter.bfloat16()), name


ADDED = ("o_proj", "down_proj")


def test_scaled_initialisation_changes_what_is_added_to_the_stream_and_nothing_else(config):
    plain, scaled = separate(initial(config)), separate(initial(config, scaled_init=True))
    factor = 1 / math.sqrt(2 * config.num_hidden_layers)
    for name, weight in plain.items():
        if name.split(".")[-2] in ADDED:
            torch.testing.assert_close(scaled[name], weight * factor, rtol=1e-6, atol=0)
        else:
            assert torch.equal(scaled[name], weight), name


def test_scaled_initialisation_is_the_same_coalesced_or_not(shape):
    one, other = (separate(initial(shape, coalesce=coalesce, scaled_init=True)) for coalesce in (True, False))
    assert all(torch.equal(weight, other[name]) for name, weight in one.items())


@pytest.mark.parametrize("scaled", [False, True])
def test_the_norm_of_the_initial_weights_is_the_expected_one(config, scaled):
    config.scaled_init = scaled
    model = initial(config)
    norm = math.sqrt(sum(float(weight.detach().double().square().sum()) for weight in model.parameters()))
    elements = sum(weight.numel() for weight in model.parameters() if weight.dim() > 1)
    assert abs(norm / initial_norm(config) - 1) < 5 / math.sqrt(2 * elements)


@pytest.mark.parametrize(
    ("changes", "norm"),
    [
        ({}, 1720.9),
        ({"scaled_init": True}, 1477.2),
        ({"initializer_range": 0.021}, 1799.4),
        ({"initializer_range": 0.021, "scaled_init": True}, 1542.2),
    ],
)
def test_the_norms_of_llama2_7b_that_the_docs_name(changes, norm):
    config = ModelConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        **changes,
    )
    assert round(initial_norm(config), 1) == norm


def test_the_docs_have_the_benchmarks_figures():
    page = (Path(__file__).parents[2] / "docs" / "numerics.md").read_text()
    assert benchmark.as_markdown(json.loads(benchmark.RESULTS.read_text())["rows"]) in page
