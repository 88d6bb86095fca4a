"""Mixtral (arXiv 2401.04088): a Llama whose feed-forward is a few of many experts, chosen by each token."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trainwright.configs.schema import ModelConfig
from trainwright.models.attention import AttentionKernel
from trainwright.models.cross_entropy import IGNORE
from trainwright.models.kv_cache import LayerCache
from trainwright.models.llama import Attention, Llama, Rope
from trainwright.models.moe_dispatch import Capacity, Dispatcher, Dropless
from trainwright.models.moe_experts import Experts
from trainwright.models.moe_router import Router, load_of
from trainwright.models.norm import RmsNorm

# What `Routed.measures` holds: the fullest expert's load over the mean one, the mean entropy of a token's
# probabilities in nats, the share of choices that were dropped, and the two losses before their coefficients.
MEASURES = ("expert_load", "router_entropy", "dropped", "aux_loss", "z_loss")


class Routed(NamedTuple):
    """What a layer says of its routing: of one micro-batch.

    loss: a scalar to be added to the mean loss of the tokens, with its gradient. measures: (5,) float32.
    """

    loss: Tensor
    measures: Tensor


def dispatcher_of(config: ModelConfig) -> Dispatcher:
    """How tokens get to experts that are all here."""
    moe = config.moe
    assert moe.num_local_experts is not None
    if moe.capacity is None:
        return Dropless(moe.num_local_experts)
    return Capacity(moe.num_local_experts, moe.capacity, renormalise=moe.norm_topk_prob)


class SparseFeedForward(nn.Module):
    """Router, dispatcher and experts: each knows nothing of the others."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.moe = config.moe
        self.gate = Router(config)
        self.dispatcher = dispatcher_of(config)
        self.experts = Experts(config)

    def forward(self, x: Tensor) -> tuple[Tensor, Routed]:
        """(B, T, D) to (B, T, D)."""
        tokens = x.flatten(0, -2)
        routing = self.gate(tokens)
        sent = self.dispatcher.dispatch(tokens, routing.experts, routing.gates)
        made = self.experts(sent.rows, sent.counts)
        out = self.dispatcher.combine(made, routing.gates, sent)
        loss = self.moe.router_z_loss_coef * routing.z
        if self.moe.load_balancing == "aux_loss":
            loss = loss + self.moe.router_aux_loss_coef * routing.aux
        load = load_of(routing.experts, self.gate.out_features).float()
        measures = (load.max() / load.mean(), routing.entropy, sent.dropped(), routing.aux, routing.z)
        return out.view(x.shape), Routed(loss, torch.stack(measures).detach())


class SparseBlock(nn.Module):
    """One decoder layer, as `llama.Block` but for its feed-forward and what that says of its routing."""

    def __init__(self, config: ModelConfig, kernel: AttentionKernel) -> None:
        super().__init__()
        self.input_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, kernel)
        self.post_attention_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SparseFeedForward(config)

    def forward(
        self, x: Tensor, rope: Rope, mask: Any, cache: LayerCache | None = None
    ) -> tuple[Tensor, Routed]:
        """(B, T, D) to (B, T, D)."""
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, cache)
        out, routed = self.mlp(self.post_attention_layernorm(x))
        return x + out, routed


class Mixtral(Llama):
    """A Mixtral decoder."""

    block = SparseBlock

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._measured: list[Tensor] = []  # by passes
        self._routed: list[Routed] = []  # by the layers of the pass that is under way

    def take_measured(self) -> dict[str, Tensor]:
        """By `MEASURES` the sums over the passes with gradients since it was last asked.

        Of a pass each is the mean over the layers, times its target tokens.
        """
        total = torch.stack(self._measured).sum(0)
        self._measured = []
        return dict(zip(MEASURES, total.unbind(), strict=True))

    def through(self, layer: nn.Module, *inputs: Any) -> Tensor:
        """See `Llama`."""
        out, routed = layer(*inputs)
        self._routed.append(routed)
        x: Tensor = out
        return x

    def forward(
        self,
        tokens: Tensor,
        documents: Tensor | None = None,
        targets: Tensor | None = None,
        cache: list[LayerCache] | None = None,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """See `Llama`. The loss is that of the tokens; its gradient is that of the routers' losses besides.

        Those are means over the micro-batch. So that it counts in a step by its target tokens, as its tokens'
        losses do, they are multiplied by their number.
        """
        self._routed = []
        result = super().forward(tokens, documents, targets, cache, hidden)
        if targets is None or not torch.is_grad_enabled():
            return result
        count = (targets != IGNORE).sum()
        losses, measures = zip(*self._routed, strict=True)
        self._routed = []
        self._measured.append(torch.stack(measures).mean(0) * count)
        with_routers: Tensor = _Beside.apply(result, torch.stack(losses).sum() * count)  # type: ignore[no-untyped-call]
        return with_routers


class _Beside(torch.autograd.Function):
    """The first of two scalars, with the gradient of their sum."""

    @staticmethod
    def forward(ctx: Any, shown: Tensor, beside: Tensor) -> Tensor:
        return shown.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], grads[0]
