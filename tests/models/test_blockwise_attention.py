import pytest
import torch

from tests.trainers.tiny import tiny_batch, tiny_recipe
from trainwright.models import blockwise_attention as module
from trainwright.models.attention import Blockwise, Sdpa
from trainwright.models.blockwise_attention import blockwise_attention, document_starts
from trainwright.models.init import init_weights
from trainwright.models.llama import Llama
from trainwright.models.storage import whole_pieces
from trainwright.trainers.recompute import recompute_activations

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def inputs(length: int, heads: int = 4, groups: int = 4, dtype: torch.dtype = torch.float64) -> Inputs:
    """q, k and v as the model makes them: transposed, and v a slice of a wider projection."""
    generator = torch.Generator().manual_seed(length)
    q, k, v = (
        torch.randn(2, length, n, 8, generator=generator, dtype=dtype).transpose(1, 2)
        for n in (heads, groups, groups + 1)
    )
    return q.requires_grad_(), k.requires_grad_(), v[:, 1:].requires_grad_()


def packed(length: int) -> torch.Tensor:
    """Documents of one token, of some, of several blocks; not the same in both sequences."""
    ends = torch.zeros(2, length, dtype=torch.long)
    for row, places in enumerate([(1, 2, 7, 40, 128, 300), (5, 127, 130, 256)]):
        ends[row, [place for place in places if place < length]] = 1
    return ends.cumsum(1)


def value_and_gradients(attended: torch.Tensor, given: Inputs) -> list[torch.Tensor]:
    direction = torch.randn(attended.shape, generator=torch.Generator().manual_seed(1)).to(attended.dtype)
    return [attended.detach(), *torch.autograd.grad(attended, given, direction)]


def check(given: Inputs, documents: torch.Tensor | None, **within: float) -> None:
    mask, starts = (None, None) if documents is None else (Sdpa().mask(documents), document_starts(documents))
    ours = value_and_gradients(blockwise_attention(*given, starts), given)
    theirs = value_and_gradients(Sdpa()(*given, mask), given)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **within)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("groups", [6, 2, 1])
@pytest.mark.parametrize("length", [1, 5, 128, 129, 384, 397])
def test_values_and_gradients_are_those_of_sdpa(length: int, groups: int, documents: bool):
    check(inputs(length, 6, groups), packed(length) if documents else None, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("documents", [False, True])
def test_probabilities_may_be_made_again(documents: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "KEPT_LENGTH", 100)
    check(inputs(300, 4, 2), packed(300) if documents else None, rtol=1e-10, atol=1e-10)


def test_each_token_its_own_document():
    """Whatever a row scores, it sees itself: nothing is divided by zero."""
    q, k, v = inputs(300)
    attended = blockwise_attention(q * 1e4, k, v, torch.arange(300).expand(2, -1))
    torch.testing.assert_close(attended, v)


def test_float32():
    check(inputs(300, dtype=torch.float32), packed(300), rtol=1e-4, atol=1e-5)


def test_bfloat16_is_computed_in_float32():
    given = inputs(300, dtype=torch.bfloat16)
    wide = tuple(t.detach().float().requires_grad_() for t in given)
    starts = document_starts(packed(300))
    ours = value_and_gradients(blockwise_attention(*given, starts), given)
    theirs = value_and_gradients(blockwise_attention(*wide, starts), wide)
    assert ours[0].dtype == torch.bfloat16
    assert torch.equal(ours[0], theirs[0].bfloat16())
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        torch.testing.assert_close(a.float(), b, rtol=2e-2, atol=2e-2)  # the direction was rounded too


@pytest.mark.parametrize("documents", [False, True])
def test_gradcheck(documents: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "ROWS", 4)
    starts = document_starts(torch.tensor([[0, 0, 1, 1, 1, 1, 1, 2, 2, 3]] * 2)) if documents else None
    assert torch.autograd.gradcheck(lambda *qkv: blockwise_attention(*qkv, starts), inputs(10, 4, 2))


@pytest.mark.parametrize("keep", [False, True])
def test_what_the_compiler_is_told_is_so(keep: bool):
    q, k, v = inputs(150, 4, 2)
    starts = None if keep else document_starts(packed(150))  # with documents not all of what is kept is used
    torch.library.opcheck(module._attend, (q, k, v, starts, keep))


def test_heads_lie_side_by_side():
    q, k, v = inputs(140, 4, 2)
    attended = blockwise_attention(q, k, v, None)
    flat = attended.transpose(1, 2).flatten(-2)
    assert flat.data_ptr() == attended.data_ptr()
    assert flat.is_contiguous()


@pytest.mark.parametrize(
    ("length", "dtype", "documents", "blockwise"),
    [
        (512, torch.float32, False, True),
        (512, torch.float32, True, True),
        (600, torch.float32, True, True),
        (600, torch.float32, False, False),
        (64, torch.float32, True, False),
        (64, torch.float32, False, False),
        (512, torch.bfloat16, False, False),
        (512, torch.bfloat16, True, True),
    ],
)
def test_sdpa_has_what_it_does_faster(length, dtype, documents, blockwise, monkeypatch: pytest.MonkeyPatch):
    calls = []
    monkeypatch.setattr(
        "trainwright.models.attention.blockwise_attention",
        lambda *given: calls.append(given) or blockwise_attention(*given),
    )
    q, k, v = inputs(length, dtype=dtype)
    ours = Blockwise()(q, k, v, Blockwise().mask(packed(length)) if documents else None)
    theirs = Sdpa()(q, k, v, Sdpa().mask(packed(length)) if documents else None)
    within = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(ours, theirs, rtol=within, atol=within)
    assert bool(calls) == blockwise


def test_decoding_is_sdpas():
    q, k, v = inputs(400, dtype=torch.float32)
    for queries in (1, 300):
        last = q[:, :, -queries:]
        assert torch.equal(Blockwise()(last, k, v, None), Sdpa()(last, k, v, None))


def gradients(mode: str, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """Of a model that attends blockwise, in blocks of 4."""
    monkeypatch.setattr(module, "ROWS", 4)
    monkeypatch.setattr(Blockwise, "shortest", 1)
    recipe, batch = tiny_recipe(), tiny_batch()
    model = Llama(recipe.model, Blockwise())
    init_weights(whole_pieces(model), recipe.model, 0)
    recompute_activations(model.layers, mode, ["matmul", "attention"])
    if compiled:
        for layer in model.layers:
            layer.self_attn.compile(fullgraph=True, backend="aot_eager")
    model(batch.tokens, batch.documents, batch.targets).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("mode", "compiled"), [("selective", False), ("full", False), ("none", True)])
def test_gradients_stay_the_same(mode: str, compiled: bool, monkeypatch: pytest.MonkeyPatch):
    expected = gradients("none", False, monkeypatch)
    ours = gradients(mode, compiled, monkeypatch)
    assert expected.keys() == ours.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, **({} if compiled else {"rtol": 0, "atol": 0}))
