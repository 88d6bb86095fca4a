"""Activation checkpointing: what the backward pass keeps and what it makes again."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

# Dear to make again for the memory that they take: matrix products and attention. The rest is elementwise.
# Not blockwise attention: the probabilities that it keeps take more than they are worth here.
KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
}


def recompute_activations(layers: Iterable[nn.Module], mode: str) -> None:
    """Make each layer keep everything (`none`), the results of KEPT (`selective`) or its input (`full`).

    Parameters keep their names: the layer's own forward is wrapped, not the layer.
    """
    if mode == "none":
        return
    for layer in layers:
        extra: dict[str, Any] = {"context_fn": _selective} if mode == "selective" else {}
        wrapped = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False, **extra)
        layer.forward = wrapped


def _selective() -> Any:
    return create_selective_checkpoint_contexts(_policy)


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
