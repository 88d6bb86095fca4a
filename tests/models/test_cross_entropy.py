import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainwright.models import cross_entropy
from trainwright.models.cross_entropy import IGNORE, VocabularyShard, linear_cross_entropy

TOKENS, WIDTH, WORDS = 37, 16, 50


@pytest.fixture(params=[1, 7 * WORDS, 1 << 23], ids=["a token", "seven tokens", "all tokens"])
def _chunk(request, monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", request.param)


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(WORDS, WIDTH, generator=generator, dtype=dtype).requires_grad_()
    targets = torch.randint(WORDS, (TOKENS,), generator=generator)
    targets[[0, 5, 6, 7, 30, 36]] = IGNORE
    return hidden, weight, targets


def expected(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, scale: float = 1.0):
    """PyTorch's own value and gradients, in double precision."""
    hidden, weight = (t.detach().double().requires_grad_() for t in (hidden, weight))
    loss = F.cross_entropy(hidden @ weight.T, targets, ignore_index=IGNORE, reduction="sum")
    return loss.detach(), *torch.autograd.grad(loss * scale, (hidden, weight))


@pytest.mark.usefixtures("_chunk")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 1 / 31])
def test_value_and_gradients(dtype, scale, close):
    hidden, weight, targets = inputs(dtype)
    loss = linear_cross_entropy(hidden, weight, targets)
    assert loss.dtype == torch.float32
    grads = torch.autograd.grad(loss * scale, (hidden, weight))
    assert [grad.dtype for grad in grads] == [dtype, dtype]
    for ours, theirs in zip((loss.detach(), *grads), expected(hidden, weight, targets, scale), strict=True):
        close(ours.double(), theirs, 1e-6)
    ignored = targets == IGNORE
    assert not grads[0][ignored].any()
    assert grads[0][~ignored].any(-1).all()


@pytest.mark.usefixtures("_chunk")
def test_bfloat16_is_as_good_as_its_logits():
    hidden, weight, targets = (t.detach() for t in inputs(torch.float32))
    hidden, weight = (t.bfloat16().requires_grad_() for t in (hidden, weight))
    loss = linear_cross_entropy(hidden, weight, targets)
    grads = torch.autograd.grad(loss, (hidden, weight))
    for ours, theirs in zip((loss.detach(), *grads), expected(hidden, weight, targets), strict=True):
        # bfloat16 keeps eight bits; each gradient is a sum of a few dozen such numbers.
        assert (ours - theirs).abs().max() < 2**-6 * theirs.abs().max()


@pytest.mark.usefixtures("_chunk")
def test_either_may_be_frozen_and_both_under_no_grad(close):
    hidden, weight, targets = inputs(torch.float32)
    value, grad_hidden, grad_weight = expected(hidden, weight, targets)
    loss = linear_cross_entropy(hidden, weight.detach(), targets)
    close(torch.autograd.grad(loss, hidden)[0].double(), grad_hidden, 1e-6)
    loss = linear_cross_entropy(hidden.detach(), weight, targets)
    close(torch.autograd.grad(loss, weight)[0].double(), grad_weight, 1e-6)
    with torch.no_grad():
        close(linear_cross_entropy(hidden, weight, targets).double(), value, 1e-6)


def test_no_targets_no_loss_and_no_gradient():
    hidden, weight, targets = inputs(torch.float32)
    loss = linear_cross_entropy(hidden, weight, torch.full_like(targets, IGNORE))
    grads = torch.autograd.grad(loss, (hidden, weight))
    assert loss == 0
    assert not any(grad.any() for grad in grads)


def test_huge_logits_stay_finite(close):
    hidden, weight, targets = inputs(torch.float32)
    hidden = (hidden * 1e4).detach().requires_grad_()
    loss = linear_cross_entropy(hidden, weight, targets)
    value, grad_hidden, _ = expected(hidden, weight, targets)
    close(loss.detach().double(), value, 1e-6)
    close(torch.autograd.grad(loss, hidden)[0].double(), grad_hidden, 1e-4)


def test_a_models_loss_is_that_of_its_logits(config, filled, close, monkeypatch):
    """Through the whole model, the head tied to the embedding where the shape has it so."""
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", 7 * config.vocab_size)
    model = filled(config)
    generator = torch.Generator().manual_seed(3)
    tokens, targets = torch.randint(config.vocab_size, (2, 2, 40), generator=generator)
    targets[0, :7] = targets[1, -3:] = IGNORE
    parameters = list(model.parameters())
    loss = model(tokens, targets=targets)
    ours = torch.autograd.grad(loss, parameters)
    reference = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), reduction="sum")
    theirs = torch.autograd.grad(reference, parameters)
    close(loss.detach(), reference.detach(), 1e-6)
    for one, other in zip(ours, theirs, strict=True):
        close(one, other)


class Largest(TorchDispatchMode):
    """The size of the largest tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.numel())
        return result


def test_all_logits_are_never_alive(monkeypatch):
    tokens, words = 512, 256
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", 16 * words)
    hidden, weight = torch.randn(tokens, 4, requires_grad=True), torch.randn(words, 4, requires_grad=True)
    targets = torch.randint(words, (tokens,))
    with Largest() as largest:
        linear_cross_entropy(hidden, weight, targets).backward()
    assert largest.elements <= 16 * words
    with Largest() as largest:
        F.cross_entropy(hidden @ weight.T, targets, reduction="sum").backward()
    assert largest.elements == tokens * words  # what is avoided, and shows that the count counts


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_shard_whose_logits_are_not_finite_says_so_whatever_its_peers_get(bad: float):
    def other(tensor: torch.Tensor) -> None:
        """The sum with another shard's numbers on a device that makes finite ones of all."""
        tensor.nan_to_num_(nan=0.0).add_(1.0)

    hidden, weight, targets = inputs(torch.float32)
    shard = VocabularyShard(0, sum=other, max=lambda tensor: tensor.nan_to_num_(nan=0.0))
    assert linear_cross_entropy(hidden, weight, targets, shard).isfinite()
    with torch.no_grad():
        weight[3, 2] = bad
        assert linear_cross_entropy(hidden, weight, targets, shard).isnan()
