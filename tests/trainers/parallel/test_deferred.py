"""Weights' gradients that are put off are those that a plain backward makes."""

import pytest
import torch

from tests.trainers.tiny import tiny_batch, tiny_recipe
from trainwright.models.init import init_weights
from trainwright.models.llama import Head, Linear, Llama
from trainwright.models.storage import whole_pieces
from trainwright.trainers.parallel.deferred import Deferred
from trainwright.trainers.recompute import recompute_activations


def model(recompute: str = "none") -> Llama:
    recipe = tiny_recipe("model.tie_word_embeddings=false")
    made = Llama(recipe.model)
    init_weights(whole_pieces(made), recipe.model, 0)
    recompute_activations(made.layers, recompute, ["matmul", "attention"])
    return made


def loss(made: Llama, seed: int) -> torch.Tensor:
    batch = tiny_batch(seed)
    return made(batch.tokens, batch.documents, batch.targets)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_gradients_of_two_micro_batches_are_the_plain_ones(recompute: str):
    plain, ours = model(), model(recompute)
    deferred = Deferred(ours)
    late = []
    for seed in range(2):
        loss(plain, seed).backward()
        loss(ours, seed).backward()
        late.append(deferred.take())
    put_off = {
        f"{name}.weight"
        for name, module in ours.named_modules()
        if isinstance(module, Linear) and not isinstance(module, Head)
    }
    assert {name for name, weight in ours.named_parameters() if weight.grad is None} == put_off
    for make in late:
        make()
    for name, weight in ours.named_parameters():
        torch.testing.assert_close(weight.grad, plain.get_parameter(name).grad, rtol=1e-5, atol=1e-4)


def test_hooks_of_the_weights_run_once_for_each_micro_batch():
    ours = model()
    deferred = Deferred(ours)
    weight = ours.layers[0].mlp.down_proj.weight
    calls = []
    weight.register_post_accumulate_grad_hook(calls.append)
    loss(ours, 0).backward()
    make = deferred.take()
    assert not calls
    make()
    make()
    assert len(calls) == 1


def test_without_gradients_nothing_is_put_off():
    ours = model()
    deferred = Deferred(ours)
    with torch.no_grad():
        assert torch.equal(loss(ours, 0), loss(model(), 0))
    assert not deferred._waiting
