import pytest
import torch
import torch.nn.functional as F

from trainwright.configs.schema import ModelConfig, MoeConfig
from trainwright.models.moe_experts import Experts, grouped_linear


@pytest.mark.parametrize("counts", [[5, 0, 3, 4], [0, 0, 12, 0], None])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_each_expert_multiplies_its_own_rows(counts, dtype, close):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 6, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(4, 10, 6, generator=generator).to(dtype).requires_grad_()
    grad = torch.randn(12, 10, generator=generator).to(dtype)
    parts = x.split(counts or [3] * 4)
    expected = torch.cat([F.linear(part, matrix) for part, matrix in zip(parts, weight, strict=True)])
    got = grouped_linear(x, weight, None if counts is None else torch.tensor(counts))
    within = 2**-7 if dtype == torch.bfloat16 else 1e-5
    close(got.float(), expected.float(), within)
    for ours, theirs in zip(
        torch.autograd.grad(got, (x, weight), grad),
        torch.autograd.grad(expected, (x, weight), grad),
        strict=True,
    ):
        close(ours.float(), theirs.float(), within)


def test_the_operators_are_whole():
    x, weight = torch.randn(12, 6).requires_grad_(), torch.randn(4, 10, 6).requires_grad_()
    torch.library.opcheck(torch.ops.trainwright.grouped_linear.default, (x, weight, torch.tensor([5, 0, 3, 4])))


@pytest.mark.parametrize("coalesce", [True, False])
def test_experts_are_feed_forwards(coalesce):
    config = ModelConfig(
        hidden_size=8, intermediate_size=256, coalesce=coalesce, moe=MoeConfig(num_local_experts=2)
    )
    experts = Experts(config)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(std=0.3)
    rows = torch.randn(7, 8)
    got = experts(rows, torch.tensor([3, 4]))
    for number, part in enumerate(rows.split([3, 4])):
        if coalesce:
            both = experts.gate_up_proj.weight[number].view(-1, 2, experts.block, 8)
            gate, up = both[:, 0].flatten(0, 1), both[:, 1].flatten(0, 1)
        else:
            gate, up = experts.gate_proj.weight[number], experts.up_proj.weight[number]
        expected = (F.silu(part @ gate.T) * (part @ up.T)) @ experts.down_proj.weight[number].T
        torch.testing.assert_close(got[3 * number : 3 + 4 * number], expected, rtol=1e-4, atol=1e-5)
