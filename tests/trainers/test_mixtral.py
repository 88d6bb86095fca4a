"""A Mixtral trains in one process as a Llama does: kept or made again, in every precision, on after a stop."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from tests.trainers.parallel.runs import read, train_until
from tests.trainers.tiny import tiny_batch, tiny_recipe
from trainwright.configs.compose import load_recipe
from trainwright.models.decoder import decoder
from trainwright.models.init import init_weights
from trainwright.models.mixtral import MEASURES, Mixtral
from trainwright.models.storage import Piece, whole_pieces
from trainwright.trainers.flops import training_flops_per_token
from trainwright.trainers.recompute import OF_EXPERTS, recompute_activations
from trainwright.trainers.rounding import bits_of, halves_of
from trainwright.trainers.train import train

SPARSE = "model.moe.num_local_experts=4"
BALANCING = ("aux_loss", "sinkhorn", "balanced", "none")


class Products(TorchDispatchMode):
    """Counts the experts' products."""

    made = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.made += func in OF_EXPERTS
        return func(*args, **(kwargs or {}))


def lines(overrides: list[str]) -> list[dict[str, float]]:
    recipe = load_recipe(overrides)
    train(recipe)
    return read(Path(recipe.run.dir) / recipe.run.name)


@pytest.mark.parametrize("precision", ["fp32", "mixed", "bf16", "bf16_sr"])
def test_it_learns_and_says_how_it_routes(tiny, precision):
    found = lines([*tiny, SPARSE, f"precision={precision}", "optim.lr=3e-3", "optim.warmup_steps=2"])
    assert found[-1]["loss"] < found[0]["loss"] - 0.3
    assert all(name in line for line in found for name in MEASURES)
    assert all(1.0 <= line["expert_load"] <= 4.0 and line["dropped"] == 0.0 for line in found)


@pytest.mark.parametrize("precision", ["fp32", "bf16_sr"])
@pytest.mark.parametrize("balancing", ["aux_loss", "sinkhorn"])
def test_it_goes_on_bit_for_bit(tiny, balancing, precision):
    words = [*tiny, SPARSE, f"model.moe.load_balancing={balancing}", f"precision={precision}"]
    whole = lines(words)
    stopped = [*words, "run.name=stopped"]
    train_until(7, stopped)
    assert lines(stopped) == whole


@pytest.mark.parametrize("balancing", BALANCING)
@pytest.mark.parametrize("capacity", ["null", "1.25"])
@pytest.mark.parametrize(
    ("mode", "keep"),
    [
        ("full", []),
        ("selective", ["matmul", "attention"]),
        ("selective", ["attention"]),
        ("selective", ["gate_up_proj", "o_proj"]),
        ("selective", ["down_proj"]),
    ],
)
def test_what_is_made_again_is_the_same_to_the_bit(mode, keep, capacity, balancing):
    recipe = tiny_recipe(SPARSE, f"model.moe.load_balancing={balancing}", f"model.moe.capacity={capacity}")

    def learnt(mode: str) -> dict[str, torch.Tensor]:
        model = decoder(recipe.model)
        assert isinstance(model, Mixtral)
        init_weights(whole_pieces(model), recipe.model, 0)
        recompute_activations(model.layers, mode, keep)
        batch = tiny_batch()
        model(batch.tokens, batch.documents, batch.targets).backward()
        return {name: p.grad for name, p in model.named_parameters()} | model.take_measured()

    kept, again = learnt("none"), learnt(mode)
    assert all(torch.equal(kept[name], again[name]) for name in kept)


@pytest.mark.parametrize(
    ("mode", "keep", "again"),
    [
        ("none", [], 0),
        ("full", [], 4),
        ("selective", ["matmul"], 0),
        ("selective", ["gate_up_proj"], 2),
        ("selective", ["attention"], 4),
    ],
)
@pytest.mark.parametrize("capacity", ["null", "1.25"])
def test_experts_products_are_kept_by_their_names(mode, keep, capacity, again):
    recipe = tiny_recipe(SPARSE, f"model.moe.capacity={capacity}")
    model, batch = decoder(recipe.model), tiny_batch()
    init_weights(whole_pieces(model), recipe.model, 0)
    recompute_activations(model.layers, mode, keep)
    loss = model(batch.tokens, batch.documents, batch.targets)
    with Products() as products:
        loss.backward()
    of_gradients = 0 if capacity == "null" else 8  # which there are batched products, too
    assert products.made == again + of_gradients


@pytest.mark.parametrize("mode", ["none", "selective"])
@pytest.mark.parametrize("words", [[], ["model.moe.capacity=1.25", "model.moe.load_balancing=sinkhorn"]])
def test_compiled_layers_are_one_graph_and_learn_the_same(mode, words):
    recipe, batch = tiny_recipe(SPARSE, *words), tiny_batch()
    found = []
    for compiles in (False, True):
        torch.compiler.reset()
        model = decoder(recipe.model)
        init_weights(whole_pieces(model), recipe.model, 0)
        recompute_activations(model.layers, mode, ["matmul", "attention"])
        if compiles:
            compiler = CompileCounterWithBackend("aot_eager_decomp_partition")
            for layer in model.layers:
                layer.compile(backend=compiler, fullgraph=True)
        model(batch.tokens, batch.documents, batch.targets).backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    assert compiler.frame_count == 1
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=1e-4, atol=1e-5, msg=name)


def test_the_bits_of_a_part_of_a_stack_are_those_of_the_whole():
    whole = Piece(torch.zeros(3, 8, 6))
    bits = bits_of(*halves_of(whole, 5)).view(3, 8, 6)
    part = Piece(torch.zeros(2, 4, 3), row=2, column=1, expert=1)
    assert torch.equal(bits_of(*halves_of(part, 5)).view(2, 4, 3), bits[1:, 2:6, 1:4])
    assert bits.unique().numel() == bits.numel()
    assert halves_of(Piece(torch.zeros(0, 4, 3)), 5)[0].shape == (0,)


def test_only_the_chosen_experts_count_as_work():
    dense = tiny_recipe().model
    sparse = tiny_recipe(SPARSE, "model.moe.num_experts_per_tok=3").model
    more = training_flops_per_token(sparse, 16) - training_flops_per_token(dense, 16)
    assert more == 6.0 * dense.num_hidden_layers * (2 * 3 * 16 * 32 + 4 * 16)
    window = tiny_recipe("model.sliding_window=4").model
    assert training_flops_per_token(window, 16) < training_flops_per_token(dense, 16)
