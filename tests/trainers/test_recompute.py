import pytest
import torch

from tests.trainers.tiny import tiny_batch, tiny_recipe
from trainwright.models.init import init_weights
from trainwright.models.llama import Llama
from trainwright.models.storage import whole_pieces
from trainwright.trainers.recompute import recompute_activations


def run(mode: str) -> tuple[int, torch.Tensor, dict[str, torch.Tensor]]:
    """Bytes that the forward keeps for the backward, the loss and the gradients."""
    recipe, batch = tiny_recipe(), tiny_batch()
    model = Llama(recipe.model)
    init_weights(whole_pieces(model), recipe.model, 0)
    recompute_activations(model.layers, mode)
    weights = {p.data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in weights:
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(batch.tokens, None, batch.targets)
    loss.backward()
    return (
        sum(kept.values()),
        loss.detach(),
        {n: p.grad for n, p in model.named_parameters() if p.grad is not None},
    )


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_losses_and_gradients_are_the_same_to_the_bit(mode: str):
    _, loss, gradients = run("none")
    _, again, recomputed = run(mode)
    assert torch.equal(loss, again)
    assert gradients.keys() == recomputed.keys()
    assert all(torch.equal(gradients[name], recomputed[name]) for name in gradients)


def test_full_checkpointing_keeps_less_than_none():
    assert run("full")[0] < run("none")[0] / 3
