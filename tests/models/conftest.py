"""Small models of the shapes that matter, filled so that each weight counts."""

import pytest
import torch

from trainwright.configs.schema import ModelConfig, RopeScaling
from trainwright.models.init import init_weights
from trainwright.models.llama import Llama
from trainwright.models.storage import whole_pieces

SHAPES = {
    # Multi-head attention, its own head.
    "llama2": ModelConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=256,
    ),
    # Four query heads a KV head, four blocks of gate and up, and wavelengths in each of the three bands.
    "llama31": ModelConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        rope_theta=10000.0,
        rope_scaling=RopeScaling(
            factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
        ),
    ),
    # Three query heads a KV head, none a power of two, and the embedding is the head.
    "smollm2": ModelConfig(
        vocab_size=96,
        hidden_size=72,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=8,
        max_position_embeddings=256,
        rope_theta=100000.0,
        tie_word_embeddings=True,
    ),
}


def filled_model(config: ModelConfig, seed: int = 0) -> Llama:
    """A model of random weights, norms included, large enough that attention isn't uniform."""
    model = Llama(config)
    config = ModelConfig(**{**vars(config), "initializer_range": 0.2})
    init_weights(whole_pieces(model), config, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
    return model


@pytest.fixture
def filled():
    return filled_model


@pytest.fixture(params=SHAPES)
def shape(request) -> ModelConfig:
    return ModelConfig(**vars(SHAPES[request.param]))


@pytest.fixture(params=["coalesced", "separate"])
def config(request, shape) -> ModelConfig:
    shape.coalesce = request.param == "coalesced"
    return shape


@pytest.fixture
def close():
    """Holds `ours` to 1e-5 of the largest of `theirs`."""

    def check(ours: torch.Tensor, theirs: torch.Tensor, within: float = 1e-5) -> None:
        assert ours.shape == theirs.shape
        error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
        print(f"relative error {error:.2e}")
        assert error < within

    return check
