import math

import pytest
import torch

from trainwright.configs.schema import ModelConfig, MoeConfig
from trainwright.models.moe_router import CHOICES, Router, aux_loss, in_turn, load_of, sinkhorn

EXPERTS, TOKENS, WIDTH = 8, 512, 16


def skewed(tokens: int = TOKENS) -> torch.Tensor:
    """Logits (tokens, 8) of which most tokens have the largest for the first experts."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(tokens, EXPERTS, generator=generator) + torch.linspace(3.0, 0.0, EXPERTS)


def imbalance(experts: torch.Tensor) -> float:
    load = load_of(experts, EXPERTS).float()
    return float(load.max() / load.mean())


def router(seed: int = 0, **moe) -> Router:
    config = ModelConfig(hidden_size=WIDTH, moe=MoeConfig(num_local_experts=EXPERTS, **moe))
    router = Router(config)
    torch.nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(seed))
    return router


def tokens() -> torch.Tensor:
    return torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))


def test_sinkhorn_scales_to_a_doubly_stochastic_matrix():
    scaled = sinkhorn(skewed(), 50)
    torch.testing.assert_close(scaled.sum(1) * TOKENS, torch.ones(TOKENS), rtol=1e-4, atol=0.0)
    torch.testing.assert_close(scaled.sum(0) * EXPERTS, torch.ones(EXPERTS), rtol=1e-4, atol=0.0)


def test_sinkhorn_does_not_overflow():
    assert sinkhorn(skewed() * 100, 16).isfinite().all()


@pytest.mark.parametrize("chosen", [1, 2])
def test_sinkhorns_choice_approaches_an_even_load(chosen):
    likeliest, even = (
        CHOICES[word](skewed(8192), MoeConfig(num_local_experts=EXPERTS, num_experts_per_tok=chosen))
        for word in ("none", "sinkhorn")
    )
    assert imbalance(likeliest) > 2.0
    assert imbalance(even) < 1.1


def test_balanced_gives_exactly_equal_counts():
    moe = MoeConfig(num_local_experts=EXPERTS)
    chosen = in_turn(skewed(), moe)
    assert load_of(chosen, EXPERTS).tolist() == [TOKENS * 2 // EXPERTS] * EXPERTS
    assert all(len(set(row)) == 2 for row in chosen.tolist())


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("balancing", CHOICES)
def test_gradients_reach_the_router_in_every_mode(balancing, normalised):
    one = router(load_balancing=balancing, norm_topk_prob=normalised)
    routing = one(tokens())
    (routing.gates * torch.rand(routing.gates.shape)).sum().backward()
    assert one.weight.grad.norm() > 0


@pytest.mark.parametrize("balancing", CHOICES)
def test_gates_are_probabilities_among_the_chosen_or_among_all(balancing):
    one = router(load_balancing=balancing)
    gates = one(tokens()).gates
    torch.testing.assert_close(gates.sum(-1), torch.ones(TOKENS))
    raw = router(load_balancing=balancing, norm_topk_prob=False)(tokens())
    probabilities = (tokens() @ one.weight.T).softmax(-1)
    torch.testing.assert_close(raw.gates, probabilities.gather(1, raw.experts))
    torch.testing.assert_close(raw.gates / raw.gates.sum(-1, keepdim=True), gates)


def test_sinkhorns_only_gate_is_the_logistic_function():
    one = router(load_balancing="sinkhorn", num_experts_per_tok=1, norm_topk_prob=False)
    routing = one(tokens())
    logits = tokens() @ one.weight.T
    torch.testing.assert_close(routing.gates, logits.gather(1, routing.experts).sigmoid())


@pytest.mark.parametrize("balancing", ["sinkhorn", "balanced"])
def test_without_gradients_tokens_go_to_their_likeliest_experts(balancing):
    one, plain = router(load_balancing=balancing), router(load_balancing="none")
    with torch.no_grad():
        assert torch.equal(one(tokens()).experts, plain(tokens()).experts)
    assert not torch.equal(one(tokens()).experts, plain(tokens()).experts)


def test_the_losses_are_their_formulas():
    one = router()
    routing = one(tokens())
    logits = tokens() @ one.weight.T
    counts = torch.bincount(routing.experts.flatten(), minlength=EXPERTS)
    expected = EXPERTS / (2 * TOKENS**2) * (counts * logits.softmax(-1).sum(0)).sum()
    torch.testing.assert_close(routing.aux, expected)
    torch.testing.assert_close(routing.z, logits.exp().sum(-1).log().square().mean())


def test_an_even_load_has_aux_loss_1_and_the_largest_entropy():
    uniform = torch.full((TOKENS, EXPERTS), 1.0 / EXPERTS)
    chosen = in_turn(uniform, MoeConfig(num_local_experts=EXPERTS))
    assert float(aux_loss(uniform, chosen)) == pytest.approx(1.0)
    silent = router()
    torch.nn.init.zeros_(silent.weight)
    assert float(silent(tokens()).entropy) == pytest.approx(math.log(EXPERTS))


def test_aux_loss_lowers_the_imbalance_of_a_router_that_is_trained():
    inputs = tokens() + 0.7  # which all experts' weights can agree on
    before, after = [], []
    for seed in range(3):
        one = router(seed)
        before.append(imbalance(one(inputs).experts))
        optimizer = torch.optim.Adam(one.parameters(), lr=0.03)
        for _ in range(60):
            optimizer.zero_grad()
            one(inputs).aux.backward()
            optimizer.step()
        after.append(imbalance(one(inputs).experts))
    assert min(before) > 1.7
    assert max(after) < 1.3


def test_logits_are_made_in_fp32_whatever_the_models_dtype():
    one = router()
    expected = one(tokens().bfloat16().float())
    with torch.no_grad():
        one.weight.copy_(one.weight.bfloat16())
        expected = one(tokens().bfloat16().float())
    got = one.to(torch.bfloat16)(tokens().bfloat16())
    assert got.gates.dtype == torch.float32
    assert torch.equal(
        got.experts, CHOICES["none"](tokens().bfloat16().float() @ one.weight.float().T, one.moe)
    )
    torch.testing.assert_close(got.z.detach(), expected.z.detach())
