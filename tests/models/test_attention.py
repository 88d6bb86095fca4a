import pytest
import torch

from trainwright.models.attention import Flex, Sdpa
from trainwright.models.kv_cache import LayerCache
from trainwright.models.llama import Llama

LENGTHS = (5, 1, 17, 9, 32)


def packed(vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two sequences of the same documents in opposite order: their tokens and their numbers."""
    documents = torch.stack(
        [
            torch.repeat_interleave(torch.arange(len(order)), torch.tensor(order))
            for order in (LENGTHS, LENGTHS[::-1])
        ]
    )
    tokens = torch.randint(vocab_size, documents.shape, generator=torch.Generator().manual_seed(2))
    return tokens, documents


@torch.no_grad()
def check_alone(model: Llama, tokens: torch.Tensor, documents: torch.Tensor, close) -> None:
    together = model(tokens, documents)
    for row in range(len(tokens)):
        for document in documents[row].unique():
            own = documents[row] == document
            close(together[row, own], model(tokens[row : row + 1, own])[0])


def test_a_packed_document_has_the_logits_that_it_has_alone(config, filled, close):
    model = filled(config)
    check_alone(model, *packed(config.vocab_size), close)


def test_without_documents_a_sequence_is_one(config, filled, close):
    model = filled(config)
    tokens, documents = packed(config.vocab_size)
    close(model(tokens), model(tokens, torch.zeros_like(documents)))
    # And packing does matter, so the masked logits above are no accident.
    assert (model(tokens) - model(tokens, documents)).abs().max() > 0.1


def test_no_token_sees_a_later_one(config, filled):
    model = filled(config)
    tokens, documents = packed(config.vocab_size)
    changed = tokens.clone()
    changed[:, 40:] = (changed[:, 40:] + 1) % config.vocab_size
    for given in (None, documents):
        assert torch.equal(model(tokens, given)[:, :40], model(changed, given)[:, :40])


def test_sdpa_mask_is_causal_within_documents():
    mask = Sdpa().mask(torch.tensor([[3, 3, 4, 4, 4]]))
    expected = [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 1, 1, 1],
    ]
    assert mask.tolist() == [[[[bool(cell) for cell in row] for row in expected]]]


@pytest.mark.parametrize("kv_heads", [6, 2, 1])
def test_query_heads_share_their_groups_keys(kv_heads, close):
    """Against attention written out, head by head, with any number of earlier keys."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 6, 5, 8, generator=generator)
    for earlier in (0, 4):
        k, v = torch.randn(2, 2, kv_heads, 5 + earlier, 8, generator=generator)
        attended = Sdpa()(q, k, v, None)
        for head in range(6):
            group = head // (6 // kv_heads)
            scores = q[:, head] @ k[:, group].mT / 8**0.5
            future = torch.arange(5 + earlier) > torch.arange(5).unsqueeze(1) + earlier
            weights = scores.masked_fill(future, float("-inf")).softmax(-1)
            close(attended[:, head], weights @ v[:, group])


@torch.no_grad()
def test_a_prompt_may_come_in_pieces(config, filled, close):
    model = filled(config)
    tokens, _ = packed(config.vocab_size)
    cache = [LayerCache(tokens.shape[1]) for _ in model.layers]
    pieces = [model(piece, cache=cache) for piece in tokens.split([10, 1, 30, 23], dim=1)]
    close(torch.cat(pieces, dim=1), model(tokens))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_agrees_with_sdpa(config, filled, close, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    model = filled(config)
    tokens, documents = packed(config.vocab_size)
    with torch.no_grad():
        expected = model(tokens, documents)
        for layer in model.layers:
            layer.self_attn.kernel = Flex()
        model.kernel = Flex()
        try:
            ours = model(tokens, documents)
        except (NotImplementedError, RuntimeError) as error:
            pytest.skip(f"this PyTorch has no uncompiled FlexAttention on the CPU: {error}")
        close(ours, expected)
        close(model(tokens), filled(config)(tokens))
