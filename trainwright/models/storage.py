"""How parameters are stored: which separate weights each one holds, and in which of its rows.

Coalesced projections are one matrix each. `qkv_proj` is stored by KV group (its query heads, then its
key, then its value) and `gate_up_proj` in blocks (gate rows, then as many up rows), so that any cut
along the rows that falls between groups or blocks gives whole heads and whole pairs, whatever the
degree. The separate weights keep Transformers' names; initial values and conversion go by them.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from trainwright.configs.blocks import gate_up_block as gate_up_block  # models take it from here
from trainwright.configs.schema import ModelConfig


class SeparateWeight(NamedTuple):
    """One weight of the reference model inside a stored parameter.

    rows: (n,) int64, the stored rows that hold this weight's rows in its own order; None: all, in order.
    expert: which of a stack of matrices (experts, rows, columns) they are rows of; None: it is no stack.
    """

    name: str
    rows: Tensor | None = None
    expert: int | None = None


class Piece(NamedTuple):
    """A block of a stored parameter, such as a rank's shard: its values, and where in the whole it starts.

    expert: the first one of a stack of matrices (experts, rows, columns).
    """

    values: Tensor
    row: int = 0
    column: int = 0
    expert: int = 0

    def of(self, expert: int | None) -> "Piece | None":
        """What is here of a stack's matrix; None: nothing. Of what is no stack, itself."""
        if expert is None:
            return self
        here = expert - self.expert
        return Piece(self.values[here], self.row, self.column) if 0 <= here < len(self.values) else None

    def rows_of(self, stored_rows: Tensor | None) -> tuple[Tensor, Tensor]:
        """A separate weight's rows that lie in this piece: their numbers in that weight, and here.

        stored_rows: as in `SeparateWeight`.
        """
        height = self.values.shape[0]
        if stored_rows is None:
            here = torch.arange(height)
            return here + self.row, here
        own = ((stored_rows >= self.row) & (stored_rows < self.row + height)).nonzero().squeeze(1)
        return own, stored_rows[own] - self.row


def whole_pieces(model: nn.Module) -> dict[str, Piece]:
    """The parameters of a model that isn't sharded, by name."""
    return {name: Piece(parameter.detach()) for name, parameter in model.named_parameters()}


def head_dim(config: ModelConfig) -> int:
    """Size of an attention head."""
    return config.head_dim or config.hidden_size // config.num_attention_heads


def kv_heads(config: ModelConfig) -> int:
    """Number of key and value heads: fewer than the query heads with grouped-query attention."""
    return config.num_key_value_heads or config.num_attention_heads


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
    """Every stored parameter of a Llama or Mixtral in order, with the separate weights that it holds."""

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
        if config.moe.num_local_experts is not None:
            yield from _sparse_weights(layer, config, config.moe.num_local_experts)
            continue
        if config.coalesce:
            separate = [SeparateWeight(*pair) for pair in zip((gate, up), gate_up_rows(config), strict=True)]
            yield f"{layer}.mlp.gate_up_proj.weight", separate
        else:
            yield from map(whole, (gate, up))
        yield whole(f"{layer}.mlp.down_proj.weight")
    yield whole("norm.weight")
    if not config.tie_word_embeddings:
        yield whole("lm_head.weight")


def _sparse_weights(
    layer: str, config: ModelConfig, experts: int
) -> Iterator[tuple[str, list[SeparateWeight]]]:
    """The stored parameters of a layer's mixture of experts: the router's, and stacks of the experts' matrices.

    The separate weights have the names of Mixtral's own files, where w1 is the gate, w2 down and w3 up.
    """
    moe = f"{layer}.block_sparse_moe"
    gate_rows, up_rows = gate_up_rows(config) if config.coalesce else (None, None)

    def of_each(*weights: tuple[str, Tensor | None]) -> list[SeparateWeight]:
        return [
            SeparateWeight(f"{moe}.experts.{expert}.{name}.weight", rows, expert)
            for expert in range(experts)
            for name, rows in weights
        ]

    yield f"{layer}.mlp.gate.weight", [SeparateWeight(f"{moe}.gate.weight")]
    if config.coalesce:
        yield f"{layer}.mlp.experts.gate_up_proj.weight", of_each(("w1", gate_rows), ("w3", up_rows))
    else:
        yield f"{layer}.mlp.experts.gate_proj.weight", of_each(("w1", None))
        yield f"{layer}.mlp.experts.up_proj.weight", of_each(("w3", None))
    yield f"{layer}.mlp.experts.down_proj.weight", of_each(("w2", None))
