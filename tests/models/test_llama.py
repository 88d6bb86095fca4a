import pytest
import torch

from trainwright.models.init import init_weights
from trainwright.models.llama import Llama
from trainwright.models.storage import whole_pieces


def test_a_model_built_without_memory_computes_once_it_has_some(config):
    with torch.device("meta"):
        model = Llama(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    expected = Llama(config)
    model.to_empty(device="cpu")
    if config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight  # PyTorch's to_empty unties what is shared
    tokens = torch.arange(20).unsqueeze(0)
    for each in (model, expected):
        init_weights(whole_pieces(each), config, 0)
    assert torch.equal(model(tokens), expected(tokens))


def test_a_tied_head_is_the_embedding(config):
    model = Llama(config)
    assert (model.lm_head.weight is model.embed_tokens.weight) == config.tie_word_embeddings


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@torch.no_grad()
def test_other_dtypes_pass_through(config, dtype, filled, close):
    model = filled(config)
    tokens = torch.arange(40).view(2, 20)
    expected = model(tokens)
    logits = model.to(dtype)(tokens)
    assert logits.dtype == dtype
    # bfloat16 keeps eight bits, and errors add up over a few layers.
    close(logits.double(), expected.double(), 2**-4 if dtype == torch.bfloat16 else 1e-5)
