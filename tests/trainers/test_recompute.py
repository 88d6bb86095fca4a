import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import recompute as benchmark
from tests.trainers.tiny import tiny_batch, tiny_recipe
from trainwright.configs.projections import projections
from trainwright.models import blockwise_attention
from trainwright.models.attention import AttentionKernel, Blockwise, Sdpa
from trainwright.models.init import init_weights
from trainwright.models.llama import Llama
from trainwright.models.storage import whole_pieces
from trainwright.trainers.recompute import OPERATORS, projections_of, recompute_activations

DEFAULT = ("matmul", "attention")
QKV, OUT, GATE_UP = (64, 32), (64, 16), (64, 64)  # shapes of the products of 64 positions
HEADS = (4, 4, 16, 4)


class Calls(TorchDispatchMode):
    """Counts the shapes that matrix products and attention make."""

    def __init__(self) -> None:
        super().__init__()
        self.made: Counter[tuple[int, ...]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if any(func in operators for operators in OPERATORS.values()):
            first = out[0] if isinstance(out, tuple) else out
            self.made[tuple(first.shape)] += 1
        return out


def built(
    mode: str, keep: Sequence[str] = DEFAULT, kernel: AttentionKernel | None = None, coalesce: bool = True
) -> Llama:
    recipe = tiny_recipe(f"model.coalesce={str(coalesce).lower()}")
    model = Llama(recipe.model, kernel)
    init_weights(whole_pieces(model), recipe.model, 0)
    recompute_activations(model.layers, mode, keep)
    return model


def kept_bytes(mode: str) -> int:
    """What the forward pass keeps for the backward, but for weights."""
    model, batch = built(mode), tiny_batch()
    weights = {p.data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in weights:
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(batch.tokens, None, batch.targets)
    return sum(kept.values())


def gradients(model: Llama) -> dict[str, torch.Tensor]:
    """With the loss."""
    batch = tiny_batch()
    loss = model(batch.tokens, batch.documents, batch.targets)
    loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None} | {"loss": loss.detach()}


def made_again(mode: str, keep: Sequence[str] = DEFAULT, **changes: Any) -> Counter[tuple[int, ...]]:
    """What the backward pass makes beyond gradients, by shape."""

    def backward(model: Llama) -> Counter[tuple[int, ...]]:
        batch = tiny_batch()
        loss = model(batch.tokens, batch.documents, batch.targets)
        with Calls() as calls:
            loss.backward()
        return calls.made

    return backward(built(mode, keep, **changes)) - backward(built("none", **changes))


@pytest.mark.parametrize("kernel", [Sdpa, Blockwise])
@pytest.mark.parametrize("coalesce", [True, False])
@pytest.mark.parametrize(
    ("mode", "keep"),
    [
        ("full", DEFAULT),
        ("selective", DEFAULT),
        ("selective", ["matmul"]),
        ("selective", ["attention"]),
        ("selective", ["attention", "o_proj"]),
        ("selective", ["down_proj", "o_proj"]),
    ],
)
def test_losses_and_gradients_are_the_same_to_the_bit(mode, keep, coalesce, kernel, monkeypatch):
    monkeypatch.setattr(Blockwise, "shortest", 1)
    expected = gradients(built("none", DEFAULT, kernel(), coalesce))
    ours = gradients(built(mode, keep, kernel(), coalesce))
    assert expected.keys() == ours.keys()
    assert all(torch.equal(expected[name], ours[name]) for name in expected)


def test_full_checkpointing_keeps_less_than_none():
    assert kept_bytes("full") < kept_bytes("none") / 3


# Two layers; a layer's last product is never needed again.
@pytest.mark.parametrize(
    ("keep", "again"),
    [
        (DEFAULT, {}),
        (["matmul"], {HEADS: 2}),
        (["attention"], {QKV: 2, OUT: 2, GATE_UP: 2}),
        (["attention", "qkv_proj"], {OUT: 2, GATE_UP: 2}),
        (["attention", "o_proj"], {QKV: 2, GATE_UP: 2}),
        (["gate_up_proj", "attention"], {QKV: 2, OUT: 2}),
        (["down_proj", "attention"], {QKV: 2, OUT: 2, GATE_UP: 2}),
        (["qkv_proj", "o_proj", "gate_up_proj"], {HEADS: 2}),
    ],
)
def test_what_the_list_does_not_name_is_made_again_and_nothing_else(keep, again):
    assert made_again("selective", keep) == again


def test_without_a_list_everything_is_made_again():
    assert made_again("full") == {QKV: 2, OUT: 2, GATE_UP: 2, HEADS: 2}


def test_separate_projections_have_names_of_their_own():
    q, k_or_v, gate_or_up = (64, 16), (64, 8), (64, 32)  # o_proj's has the shape of q_proj's
    everything = Counter({q: 4, k_or_v: 4, gate_or_up: 4})
    for name, shape in {"q_proj": q, "k_proj": k_or_v, "v_proj": k_or_v, "up_proj": gate_or_up}.items():
        again = made_again("selective", ["attention", name], coalesce=False)
        assert everything - again == {shape: 2}, name


@pytest.mark.parametrize(("longest_kept", "again"), [(512, {HEADS: 2}), (1, {})])
def test_blockwise_attention_is_kept_where_it_does_not_hand_on_its_probabilities(
    longest_kept, again, monkeypatch
):
    monkeypatch.setattr(Blockwise, "shortest", 1)
    monkeypatch.setattr(blockwise_attention, "KEPT_LENGTH", longest_kept)
    assert made_again("selective", kernel=Blockwise()) == again


@pytest.mark.parametrize("coalesce", [True, False])
def test_recipes_name_the_projections_that_a_layer_has(coalesce):
    assert tuple(projections_of(built("none", coalesce=coalesce).layers[0])) == projections(coalesce)


@pytest.mark.parametrize(
    ("mode", "keep"), [("none", []), ("selective", ["attention", "qkv_proj"]), ("full", [])]
)
@pytest.mark.parametrize("kernel", [Sdpa, Blockwise])
def test_compiled_layers_are_one_graph_and_compute_the_same(mode: str, keep: list[str], kernel: Any):
    expected, model = gradients(built("none", kernel=kernel())), built(mode, keep, kernel())
    torch._dynamo.reset()
    compiler = CompileCounterWithBackend("aot_eager_decomp_partition")
    for layer in model.layers:
        layer.compile(backend=compiler, fullgraph=True)
    ours = gradients(model)
    assert compiler.frame_count == 1
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient)


def test_the_docs_have_the_benchmarks_figures():
    page = (Path(__file__).parents[2] / "docs" / "numerics.md").read_text()
    results = json.loads(benchmark.RESULTS.read_text())
    assert benchmark.as_markdown(results) in page
    assert [row["row"] for row in results["rows"]] == [row.name for row in benchmark.ROWS]
