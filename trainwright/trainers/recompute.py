"""Activation checkpointing: what the backward pass keeps and what it makes again (arXiv 2205.05198)."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain, repeat
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import trainwright.models.blockwise_attention  # noqa: F401 -- registers its operator
from trainwright.models.moe_experts import GroupedLinear

BLOCKWISE = torch.ops.trainwright.blockwise_attention.default

# How experts' products are made; PyTorch's own batched one makes nothing else in a sparse layer.
OF_EXPERTS = frozenset({torch.ops.trainwright.grouped_linear.default, torch.ops.aten.bmm.default})

# The words of `train.recompute_keep` and the operators whose results they keep.
OPERATORS: dict[str, frozenset[Any]] = {
    "matmul": frozenset({torch.ops.aten.mm.default, torch.ops.aten.addmm.default}),
    "attention": frozenset(
        {
            torch.ops.aten._scaled_dot_product_flash_attention.default,
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
            torch.ops.aten._scaled_dot_product_efficient_attention.default,
            torch.ops.aten._scaled_dot_product_cudnn_attention.default,
            torch.ops.aten._scaled_dot_product_fused_attention_overrideable.default,  # a device's own
            # In compiled layers: elsewhere FlexAttention is compiled alone, which hides it.
            torch.ops.higher_order.flex_attention,
            BLOCKWISE,
        }
    ),
}


def recompute_activations(layers: Iterable[nn.Module], mode: str, keep: Sequence[str]) -> None:
    """Make each layer keep everything (`none`), what `keep` names (`selective`) or its input (`full`).

    keep: words of OPERATORS, and names of a layer's projections.

    Parameters keep their names: the layer's own forward is wrapped, not the layer.
    """
    if mode == "none":
        return
    operators = frozenset().union(*(OPERATORS[word] for word in keep if word in OPERATORS))
    for layer in layers:
        extra: dict[str, Any] = {}
        if mode == "selective":
            every = "matmul" in keep
            products = [every or name in keep for name in projections_of(layer)]
            of_experts = [every or name in keep for name in projections_of(layer, GroupedLinear)]
            if not of_experts:
                products[-1] = False  # a dense layer's last one is added up and never needed again
            extra["context_fn"] = partial(_selective, operators, products, every, of_experts)
        layer.forward = _recomputing(layer.forward, extra)


def _recomputing(forward: Callable[..., Any], extra: dict[str, Any]) -> Callable[..., Any]:
    """`forward`, whose results the backward pass makes again.

    A function of our own, not a `partial`: `torch.compile` passes over `checkpoint` unless ours calls it.
    """

    def recomputing(*inputs: Any) -> Any:
        return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False, **extra)

    return recomputing


def projections_of(layer: nn.Module, kind: type[nn.Module] = nn.Linear) -> list[str]:
    """The names of a layer's projections, in the order in which it makes their products."""
    modules = layer.named_modules()
    return [name.rpartition(".")[2] for name, module in modules if isinstance(module, kind)]


def _selective(
    operators: frozenset[Any], products: Sequence[bool], every: bool, of_experts: Sequence[bool]
) -> Any:
    """The contexts of a layer's forward pass and of its repetition.

    products: for each of the layer's matrix products in turn, whether its result is kept; every: of any more.
    of_experts: the same for those of experts.
    Counting works under `torch.compile` too, which never sees the modules.
    """
    # Up to torch 2.12 the repetition asks again, each operator in the same order.
    turns = {again: chain(products, repeat(every)) for again in (False, True)}
    turns_of_experts = {again: chain(of_experts, repeat(False)) for again in (False, True)}

    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if operator in OPERATORS["matmul"]:
            kept = next(turns[context.is_recompute])
        elif operator in OF_EXPERTS:
            kept = next(turns_of_experts[context.is_recompute])
        else:
            kept = operator in operators and not _with_probabilities(operator, args)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def _with_probabilities(operator: Any, args: tuple[Any, ...]) -> bool:
    """Whether blockwise attention hands on its probabilities too: they take more than they are worth here."""
    return operator is BLOCKWISE and bool(args[-1])
