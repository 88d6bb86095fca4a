import pytest
import torch

from trainwright.models.moe_dispatch import Capacity, Dispatcher, Dropless, capacity_of

EXPERTS, TOKENS, WIDTH, CHOSEN = 4, 30, 6, 2


def routed(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, experts and gates; the first expert has about half of the choices."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    logits = torch.randn(TOKENS, EXPERTS, generator=generator) + torch.tensor([3.0, 0.0, 0.0, 0.0])
    values, experts = logits.topk(CHOSEN, dim=-1)
    return x.requires_grad_(), experts, values.softmax(-1).double().requires_grad_()


def through(dispatcher: Dispatcher, x, experts, gates) -> torch.Tensor:
    """With experts that multiply by 1, 2, 3, 4 and square, so that none is like another."""
    sent = dispatcher.dispatch(x, experts, gates)
    counts = sent.counts if sent.counts is not None else torch.tensor([len(sent.rows) // EXPERTS] * EXPERTS)
    factor = torch.arange(1.0, EXPERTS + 1).double().repeat_interleave(counts).unsqueeze(1)
    return dispatcher.combine((sent.rows * factor).square(), gates, sent)


def plainly(x, experts, gates) -> torch.Tensor:
    return ((x.unsqueeze(1) * (experts + 1).unsqueeze(-1)).square() * gates.unsqueeze(-1)).sum(1)


@pytest.mark.parametrize("dispatcher", [Dropless(EXPERTS), Capacity(EXPERTS, 4.0, renormalise=False)])
def test_every_token_gets_its_experts_results_and_gradients(dispatcher):
    inputs = routed()
    grad = torch.randn(TOKENS, WIDTH, dtype=torch.float64)
    expected = plainly(*inputs)
    wanted = torch.autograd.grad(expected, inputs[::2], grad)
    got = through(dispatcher, *inputs)
    torch.testing.assert_close(got, expected)
    for ours, theirs in zip(torch.autograd.grad(got, inputs[::2], grad), wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_rows_are_sorted_by_expert_and_counted():
    x, experts, gates = routed()
    sent = Dropless(EXPERTS).dispatch(x, experts, gates)
    assert sent.counts.tolist() == torch.bincount(experts.flatten(), minlength=EXPERTS).tolist()
    assert experts.flatten()[sent.slots].tolist() == sorted(experts.flatten().tolist())
    assert torch.equal(sent.rows, x[sent.slots // CHOSEN])
    assert float(sent.dropped()) == 0.0


def kept_by_hand(experts, gates, room: int) -> torch.Tensor:
    kept = torch.zeros_like(experts, dtype=torch.bool)
    for expert in range(EXPERTS):
        places = (experts == expert).nonzero().tolist()
        places.sort(key=lambda place: -gates[tuple(place)].item())
        for token, choice in places[:room]:
            kept[token, choice] = True
    return kept


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("factor", [1.0, 1.3])
def test_what_is_beyond_the_capacity_is_dropped_and_counted(factor, renormalise):
    x, experts, gates = routed()
    dispatcher = Capacity(EXPERTS, factor, renormalise=renormalise)
    sent = dispatcher.dispatch(x, experts, gates)
    room = capacity_of(TOKENS * CHOSEN, EXPERTS, factor)
    kept = kept_by_hand(experts, gates, room)
    assert len(sent.rows) == EXPERTS * room
    assert torch.equal(sent.kept, kept)
    assert 0.0 < float(sent.dropped()) == pytest.approx(1.0 - float(kept.float().mean()))

    left = gates * kept
    if renormalise:  # what is left of a token's gates sums to 1 again
        left = left / left.sum(-1, keepdim=True).clamp(min=1e-9)
    grad = torch.randn(TOKENS, WIDTH, dtype=torch.float64)
    expected = plainly(x, experts, left)
    wanted = torch.autograd.grad(expected, (x, gates), grad)
    got = through(dispatcher, x, experts, gates)
    torch.testing.assert_close(got, expected)
    for ours, theirs in zip(torch.autograd.grad(got, (x, gates), grad), wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_token_that_every_expert_dropped_gets_nothing():
    x = torch.ones(4, 1)
    experts = torch.zeros(4, 1, dtype=torch.int64)
    gates = torch.tensor([[0.5], [0.9], [0.7], [0.2]])
    dispatcher = Capacity(4, 2.0, renormalise=True)
    sent = dispatcher.dispatch(x, experts, gates)
    assert sent.kept.flatten().tolist() == [False, True, True, False]
    assert dispatcher.combine(sent.rows, gates, sent).flatten().tolist() == pytest.approx([0.0, 1.0, 1.0, 0.0])


def test_rows_that_are_nobodys_do_not_learn():
    x, experts, gates = routed()
    dispatcher = Capacity(EXPERTS, 4.0, renormalise=False)
    sent = dispatcher.dispatch(x, experts, gates)
    made = sent.rows.detach().requires_grad_()
    dispatcher.combine(made, gates, sent).sum().backward()
    assert int((made.grad.abs().sum(1) > 0).sum()) == TOKENS * CHOSEN < len(made)


def test_results_of_bf16_experts_are_added_up_in_fp32():
    x, experts, gates = (t.detach() for t in routed())
    dispatcher = Dropless(EXPERTS)
    sent = dispatcher.dispatch(x.bfloat16(), experts, gates.float())
    got = dispatcher.combine(sent.rows, gates.float(), sent)
    assert got.dtype == torch.bfloat16
    expected = (x.bfloat16().float() * gates.float().sum(1, keepdim=True)).bfloat16()
    torch.testing.assert_close(got, expected, rtol=2**-8, atol=0.0)
