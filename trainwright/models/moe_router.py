"""Which experts a token goes to, and with which weights (arXiv 1701.06538; Mixtral, 2401.04088).

Shapes in comments: N tokens, E experts, K experts a token.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from trainwright.configs.schema import ModelConfig, MoeConfig
from trainwright.models.llama import Linear


class Routing(NamedTuple):
    """What a router says of N tokens.

    experts: (N, K) int64. gates: (N, K) float32, with which the experts' results are added up. aux, z: the two
    losses before their coefficients. entropy: of a token's probabilities, the mean, in nats. Scalars float32.
    """

    experts: Tensor
    gates: Tensor
    aux: Tensor
    z: Tensor
    entropy: Tensor


class Router(Linear):
    """A linear layer with a logit for each expert, computed in fp32."""

    def __init__(self, config: ModelConfig) -> None:
        moe = config.moe
        assert moe.num_local_experts is not None
        super().__init__(config.hidden_size, moe.num_local_experts)
        self.moe = moe
        self.choose = CHOICES[moe.load_balancing]

    def forward(self, x: Tensor) -> Routing:  # type: ignore[override]
        """Of tokens (N, hidden size). Where no gradient is asked for, each goes to its likeliest experts."""
        logits = F.linear(x.float(), self.weight.float())  # N E
        choose = self.choose if torch.is_grad_enabled() else likeliest
        with torch.no_grad():
            experts = choose(logits, self.moe)
        probabilities = logits.softmax(-1)
        return Routing(
            experts,
            gates_of(logits, probabilities, experts, self.moe),
            aux_loss(probabilities, experts),
            logits.logsumexp(-1).square().mean(),
            torch.special.entr(probabilities.detach()).sum(-1).mean(),
        )


def likeliest(logits: Tensor, moe: MoeConfig) -> Tensor:
    """The K experts of the largest logits (N, E), the largest first: (N, K)."""
    return logits.topk(moe.num_experts_per_tok, dim=-1).indices


def by_sinkhorn(logits: Tensor, moe: MoeConfig) -> Tensor:
    """The K likeliest once the probabilities are scaled so that all experts are wanted equally: (N, K).

    It looks at all tokens, later ones of the same sequence too, which an evaluation can't (docs/moe.md).
    """
    return sinkhorn(logits, moe.sinkhorn_iterations).topk(moe.num_experts_per_tok, dim=-1).indices


def in_turn(logits: Tensor, moe: MoeConfig) -> Tensor:
    """Every expert equally often, whatever the logits (N, E) say: (N, K). For timing, not for learning."""
    tokens, experts = logits.shape
    slots = torch.arange(tokens * moe.num_experts_per_tok, device=logits.device)
    return (slots % experts).view(tokens, -1)


Choice = Callable[[Tensor, MoeConfig], Tensor]

# By the word of model.moe.load_balancing.
CHOICES: dict[str, Choice] = {
    "aux_loss": likeliest,
    "sinkhorn": by_sinkhorn,
    "balanced": in_turn,
    "none": likeliest,
}


def sinkhorn(logits: Tensor, iterations: int) -> Tensor:
    """exp(logits) (N, E) with rows and columns scaled: rows sum to 1 / N, columns to about 1 / E.

    A fixed number of turns (Sinkhorn & Knopp 1967): a device with static shapes can't wait for convergence.
    """
    # A row's largest value is 1: rows are scaled anyhow, and nothing overflows.
    cost = (logits - logits.amax(-1, keepdim=True)).exp()
    tokens, experts = cost.shape
    # Sums, not matrix products: selective activation checkpointing counts those of a layer.
    rows = 1.0 / (tokens * cost.sum(1, keepdim=True))
    for _ in range(iterations):
        columns = 1.0 / (experts * (rows * cost).sum(0) + 1e-8)
        rows = 1.0 / (tokens * (cost * columns).sum(1, keepdim=True) + 1e-8)
    return rows * cost * columns


def gates_of(logits: Tensor, probabilities: Tensor, experts: Tensor, moe: MoeConfig) -> Tensor:
    """The gates (N, K) of the chosen `experts` (N, K), through which the router learns whatever the choice was.

    Normalised, they are the probabilities among the chosen; raw, those among all (the logistic function of the
    logit where sinkhorn chooses one expert, as Megatron-LM has it).
    """
    if moe.norm_topk_prob:
        return logits.gather(-1, experts).softmax(-1)
    if moe.load_balancing == "sinkhorn" and moe.num_experts_per_tok == 1:
        return logits.gather(-1, experts).sigmoid()
    return probabilities.gather(-1, experts)


def load_of(experts: Tensor, count: int) -> Tensor:
    """How many of the choices (N, K) fall on each of `count` experts: (E,) int64."""
    chosen = experts.flatten()
    return torch.zeros(count, dtype=torch.int64, device=experts.device).scatter_add_(
        0, chosen, torch.ones_like(chosen)
    )


def aux_loss(probabilities: Tensor, experts: Tensor) -> Tensor:
    """E times the sum over experts of (share of the choices) x (mean probability): 1 where both are even.

    Switch Transformers, arXiv 2101.03961, equation 4, with K choices a token.
    """
    tokens, count = probabilities.shape
    share = load_of(experts, count).to(probabilities.dtype) / experts.numel()
    return count / tokens * (share * probabilities.sum(0)).sum()
