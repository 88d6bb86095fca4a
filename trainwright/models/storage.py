"""How parameters are stored: which separate weights each one holds, and in which of its rows.

Coalesced projections are one matrix each. `qkv_proj` is stored by KV group (its query heads, then its
key, then its value) and `gate_up_proj` in blocks (gate rows, then as many up rows), so that any cut
along the rows that falls between groups or blocks gives whole heads and whole pairs, whatever the
degree. The separate weights keep Transformers' names; initial values and conversion go by them.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from trainwright.configs.schema import ModelConfig


class SeparateWeight(NamedTuple):
    """One weight of the reference model inside a stored parameter.

    rows: (n,) int64, the stored rows that hold this weight's rows in its own order; None: all, in order.
    """

    name: str
    rows: Tensor | None = None


def head_dim(config: ModelConfig) -> int:
    """Size of an attention head."""
    return config.head_dim or config.hidden_size // config.num_attention_heads


def kv_heads(config: ModelConfig) -> int:
    """Number of key and value heads: fewer than the query heads with grouped-query attention."""
    return config.num_key_value_heads or config.num_attention_heads


def gate_up_block(intermediate_size: int) -> int:
    """Rows of gate (and of up) in a block of `gate_up_proj`: a function of the size alone.

    As many blocks as tensor parallelism may want to part (a power of two, 32 at most), but no block so
    narrow (under 128) that elementwise kernels over its columns lose their vector loops.
    """
    blocks = 32
    while blocks > 1 and (intermediate_size % blocks or intermediate_size // blocks < 128):
        blocks //= 2
    return intermediate_size // blocks


def qkv_rows(config: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    """The stored rows of q, k and v in `qkv_proj`, whose rows are (kv_heads, q_per_kv + 2, head_dim)."""
    groups, per_group = kv_heads(config), config.num_attention_heads // kv_heads(config)
    rows = torch.arange(groups * (per_group + 2) * head_dim(config)).view(groups, per_group + 2, -1)
    return rows[:, :-2].flatten(), rows[:, -2].flatten(), rows[:, -1].flatten()


def gate_up_rows(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """The stored rows of gate and up in `gate_up_proj`, whose rows are (blocks, 2, block)."""
    rows = torch.arange(2 * config.intermediate_size).view(-1, 2, gate_up_block(config.intermediate_size))
    return rows[:, 0].flatten(), rows[:, 1].flatten()


def stored_weights(config: ModelConfig) -> Iterator[tuple[str, list[SeparateWeight]]]:
    """Every stored parameter of a Llama in order, with the separate weights that it holds."""

    def whole(name: str) -> tuple[str, list[SeparateWeight]]:
        return name, [SeparateWeight(name)]

    yield whole("embed_tokens.weight")
    for index in range(config.num_hidden_layers):
        layer = f"layers.{index}"
        yield whole(f"{layer}.input_layernorm.weight")
        q, k, v = (f"{layer}.self_attn.{name}_proj.weight" for name in "qkv")
        gate, up = (f"{layer}.mlp.{name}_proj.weight" for name in ("gate", "up"))
        if config.coalesce:
            separate = [SeparateWeight(*pair) for pair in zip((q, k, v), qkv_rows(config), strict=True)]
            yield f"{layer}.self_attn.qkv_proj.weight", separate
        else:
            yield from map(whole, (q, k, v))
        yield whole(f"{layer}.self_attn.o_proj.weight")
        yield whole(f"{layer}.post_attention_layernorm.weight")
        if config.coalesce:
            separate = [SeparateWeight(*pair) for pair in zip((gate, up), gate_up_rows(config), strict=True)]
            yield f"{layer}.mlp.gate_up_proj.weight", separate
        else:
            yield from map(whole, (gate, up))
        yield whole(f"{layer}.mlp.down_proj.weight")
    yield whole("norm.weight")
    if not config.tie_word_embeddings:
        yield whole("lm_head.weight")
