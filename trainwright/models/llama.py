"""Llama 2 and 3 (arXiv 2307.09288, 2407.21783): ordinary modules, on one device, of any dtype.

Shapes in comments: B batch, T length, D hidden size, G KV heads, R query heads a KV head, K head dim.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainwright.configs.schema import ModelConfig
from trainwright.models.attention import AttentionKernel, Sdpa
from trainwright.models.cross_entropy import VocabularyShard, linear_cross_entropy
from trainwright.models.kv_cache import LayerCache
from trainwright.models.norm import RmsNorm
from trainwright.models.rope import inverse_frequencies, rope_tables, rotate
from trainwright.models.storage import gate_up_block, head_dim, kv_heads
from trainwright.models.swiglu import coalesced_swiglu

Rope = tuple[Tensor, Tensor]


class Linear(nn.Linear):
    """A bias-free projection whose values come from `init_weights`, not from its constructor.

    multiply: (x, weight) to x @ weight.T; set where its gradients are made in another way.
    """

    multiply: Callable[[Tensor, Tensor], Tensor] = staticmethod(F.linear)

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) to (..., outputs)."""
        return self.multiply(x, self.weight)

    def reset_parameters(self) -> None:
        """Leave the memory as it is."""


class Embedding(nn.Embedding):
    """An embedding whose values come from `init_weights`, not from its constructor."""

    def reset_parameters(self) -> None:
        """Leave the memory as it is."""


class Attention(nn.Module):
    """Grouped-query attention with rotary embeddings.

    groups: key and value heads of the whole model; how many are here follows from what the projections give.
    per_group: query heads here that share a key and a value.
    """

    def __init__(self, config: ModelConfig, kernel: AttentionKernel) -> None:
        super().__init__()
        self.head_dim = head_dim(config)
        self.groups = kv_heads(config)
        self.per_group = config.num_attention_heads // self.groups
        self.kernel = kernel
        width = config.num_attention_heads * self.head_dim
        kv_width = self.groups * self.head_dim
        if config.coalesce:
            self.qkv_proj = Linear(config.hidden_size, width + 2 * kv_width)
        else:
            self.q_proj = Linear(config.hidden_size, width)
            self.k_proj = Linear(config.hidden_size, kv_width)
            self.v_proj = Linear(config.hidden_size, kv_width)
        self.coalesce = config.coalesce
        self.o_proj = Linear(width, config.hidden_size)

    def forward(self, x: Tensor, rope: Rope, mask: Tensor | None, cache: LayerCache | None = None) -> Tensor:
        """(B, T, D) to (B, T, D); with a cache, T counts the new tokens only."""
        if self.coalesce:
            groups = self.qkv_proj(x).unflatten(-1, (-1, self.per_group + 2, self.head_dim))  # B T G R+2 K
            q, k, v = groups.split((self.per_group, 1, 1), dim=-2)
        else:
            q, k, v = (
                proj(x).unflatten(-1, (-1, heads, self.head_dim))  # B T G heads K
                for proj, heads in ((self.q_proj, self.per_group), (self.k_proj, 1), (self.v_proj, 1))
            )
        q, k, v = (
            t.flatten(2, 3).transpose(1, 2) for t in (rotate(q, *rope), rotate(k, *rope), v)
        )  # B heads T K
        if cache is not None:
            k, v = cache.append(k, v)
        attended = self.kernel(q, k, v, mask)  # B heads T K
        projected: Tensor = self.o_proj(attended.transpose(1, 2).flatten(-2))
        return projected


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.coalesce = config.coalesce
        self.block = gate_up_block(config.intermediate_size)
        if config.coalesce:
            self.gate_up_proj = Linear(config.hidden_size, 2 * config.intermediate_size)
        else:
            self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
            self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        if self.coalesce:
            activated = coalesced_swiglu(self.gate_up_proj(x), self.block)
        else:
            activated = F.silu(self.gate_proj(x)) * self.up_proj(x)
        projected: Tensor = self.down_proj(activated)
        return projected


class Block(nn.Module):
    """One decoder layer: x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: ModelConfig, kernel: AttentionKernel) -> None:
        super().__init__()
        self.input_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, kernel)
        self.post_attention_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = FeedForward(config)

    def forward(self, x: Tensor, rope: Rope, mask: Tensor | None, cache: LayerCache | None = None) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, cache)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Head(Linear):
    """Logits, or with targets the summed loss without ever holding all logits.

    shard: set where the weight is the rows of some words only.
    """

    shard: VocabularyShard | None = None

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        """(B, T, D) to logits (B, T, vocabulary), or to a float32 scalar in nats."""
        if targets is None:
            logits: Tensor = super().forward(x)
            return logits
        return linear_cross_entropy(x, self.weight, targets, self.shard)


class Llama(nn.Module):
    """A Llama decoder. Its weights hold nothing until `init_weights` or a checkpoint fills them.

    layers: make only the part of it that has these, under their numbers in the whole. The part with the first
    has the embedding too, the part with the last the final norm and the head.
    """

    block: Callable[[ModelConfig, AttentionKernel], nn.Module] = Block

    def __init__(
        self, config: ModelConfig, kernel: AttentionKernel | None = None, layers: range | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.kernel = kernel or Sdpa(config.sliding_window)
        own = range(config.num_hidden_layers) if layers is None else layers
        self.begins, self.ends = own.start == 0, own.stop == config.num_hidden_layers
        if self.begins:
            self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList()
        for number in own:
            self.layers.add_module(str(number), self.block(config, self.kernel))
        if self.ends:
            self.norm = RmsNorm(config.hidden_size, config.rms_norm_eps)
            self.lm_head = Head(config.hidden_size, config.vocab_size)
        if self.begins and self.ends and config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.angles = inverse_frequencies(config)

    def through(self, layer: nn.Module, *inputs: Any) -> Tensor:
        """What a layer makes of its inputs, (B, T, D)."""
        x: Tensor = layer(*inputs)
        return x

    def forward(
        self,
        tokens: Tensor,
        documents: Tensor | None = None,
        targets: Tensor | None = None,
        cache: list[LayerCache] | None = None,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, T, vocabulary) of `tokens` (B, T); with `targets` (B, T) the summed loss in nats.

        A part without the last layer gives its last layer's output, (B, T, D); a part without the first takes
        that of the part before as `hidden`.

        documents: (B, T) non-decreasing numbers; tokens attend within their own. None: one a sequence.
        cache: what earlier tokens left, one entry a layer; it takes these in.

        Positions count from the sequence's start also where a document starts later: rotary attention
        depends on differences of positions only.
        """
        x = self.embed_tokens(tokens) if hidden is None else hidden
        start = 0 if cache is None else cache[0].length
        rope = rope_tables(self.angles.to(x.device), start, tokens.shape[1], x.dtype)
        window = self.config.sliding_window
        if documents is None and cache is None and window is not None and window < tokens.shape[1]:
            documents = torch.zeros_like(tokens)  # one: with a window not even that is seen whole
        mask = None if documents is None else self.kernel.mask(documents)
        for index, layer in enumerate(self.layers):
            x = self.through(layer, x, rope, mask, None if cache is None else cache[index])
        result: Tensor = self.lm_head(self.norm(x), targets) if self.ends else x
        return result
