import pytest
import torch

from tests.trainers.tiny import tiny_batch, tiny_recipe
from trainwright.configs.schema import Recipe
from trainwright.models.init import init_weights
from trainwright.models.llama import Llama
from trainwright.models.storage import whole_pieces
from trainwright.trainers.data.batch import IGNORE, Batch
from trainwright.trainers.parallel.apply import Layout
from trainwright.trainers.parallel.ranks import Ranks
from trainwright.trainers.precision import PRECISIONS
from trainwright.trainers.steppers.eager import EagerStepper
from trainwright.trainers.steppers.updating import sum_of_squares


def stepper(recipe: Recipe) -> EagerStepper:
    model = Llama(recipe.model)
    model.to(PRECISIONS[recipe.precision.mode].kept_in)
    init_weights(whole_pieces(model), recipe.model, recipe.seed)
    layout, device = Layout(Ranks(), zero=0), torch.device("cpu")
    return EagerStepper(model, lambda m, b: m(b.tokens, b.documents, b.targets), recipe, layout, device)


def norms(of: EagerStepper) -> torch.Tensor:
    return of.squares().sqrt()


def targets_of(batch: Batch) -> int:
    return int((batch.targets != IGNORE).sum())


@pytest.mark.parametrize("size", [1, 2])
def test_gradients_are_those_of_the_mean_over_all_target_tokens(size: int):
    batch = tiny_batch()
    ours = stepper(tiny_recipe(f"train.micro_batch_size={size}"))
    loss = ours.forward_backward(batch, targets_of(batch)) / targets_of(batch)

    reference = Llama(tiny_recipe().model)
    init_weights(whole_pieces(reference), tiny_recipe().model, 0)
    logits = reference(batch.tokens)
    mean = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE)
    mean.backward()
    torch.testing.assert_close(loss, mean)
    for name, weight in ours.weights.local.items():
        torch.testing.assert_close(weight.grad, reference.get_parameter(name).grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", ["fp32", "mixed"])
def test_an_update_is_adamw_with_the_gradients_clipped_to_the_global_norm(mode: str):
    recipe = tiny_recipe(f"precision={mode}", "optim.decay=all")
    ours, batch = stepper(recipe), tiny_batch()
    ours.forward_backward(batch, targets_of(batch))
    copies = [w.detach().clone().requires_grad_() for w in ours.weights.local.values()]
    for copy, weight in zip(copies, ours.weights.local.values(), strict=True):
        assert weight.grad is not None
        copy.grad = weight.grad.clone()
    norm = torch.nn.utils.clip_grad_norm_(copies, 0.01)
    assert norm > 0.01
    torch.testing.assert_close(norms(ours)[0], norm)
    torch.testing.assert_close(norms(ours)[1], torch.nn.utils.get_total_norm([c.detach() for c in copies]))
    torch.optim.AdamW(copies, lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1).step()
    ours.update(0.1, norms(ours)[0], 0.01)
    for copy, weight in zip(copies, ours.weights.local.values(), strict=True):
        torch.testing.assert_close(weight, copy, rtol=1e-5, atol=1e-6)
        assert weight.grad is None


def test_weight_decay_spares_the_vectors_unless_asked():
    for decay, moves in (("matrices", False), ("all", True)):
        ours = stepper(tiny_recipe(f"optim.decay={decay}"))
        for weight in ours.weights.local.values():
            weight.grad = torch.zeros_like(weight)
        ours.update(0.1, norms(ours)[0], None)
        before, after = stepper(tiny_recipe()).weights.local, ours.weights.local
        assert bool((after["norm.weight"] != 1).any()) is moves
        assert after["layers.0.mlp.down_proj.weight"].norm() < before["layers.0.mlp.down_proj.weight"].norm()


@pytest.mark.parametrize("mode", ["fp32", "mixed", "bf16_sr"])
def test_a_skipped_update_changes_nothing_but_drops_the_gradients(mode: str):
    # bf16 without masters keeps gradients of its own, here the sums of two micro-batches
    ours, batch = stepper(tiny_recipe(f"precision={mode}", "train.micro_batch_size=1")), tiny_batch()
    before = {name: weight.detach().clone() for name, weight in ours.weights.local.items()}
    ours.forward_backward(batch, targets_of(batch))
    gradients = {name: gradient.clone() for name, gradient in ours.weights.gradients.items()}
    assert gradients.keys() == before.keys()
    ours.update(0.1, norms(ours)[0], 1.0, skip=True)
    assert not ours.weights.gradients
    ours.forward_backward(batch, targets_of(batch))
    for name, gradient in ours.weights.gradients.items():  # nothing of the skipped step is left in them
        assert torch.equal(gradient, gradients[name])
    ours.weights.drop_gradients()
    for name, weight in ours.weights.local.items():
        assert torch.equal(weight, before[name])
        assert weight.grad is None
        assert ours.optimizer.state[weight]["step"] == 0


def test_micro_batches_accumulate_in_fp32_under_mixed_precision():
    ours, batch = stepper(tiny_recipe("precision=mixed", "train.micro_batch_size=1")), tiny_batch()
    assert ours.model.embed_tokens.weight.dtype == torch.bfloat16
    ours.forward_backward(batch, targets_of(batch))
    for weight in ours.weights.local.values():
        assert weight.dtype == torch.float32
        assert weight.grad is not None
        assert weight.grad.dtype == torch.float32
    assert all(parameter.grad is None for parameter in ours.model.parameters())
    gradient = ours.weights.local["embed_tokens.weight"].grad
    assert gradient is not None
    assert not torch.equal(gradient, gradient.bfloat16().float())


@pytest.mark.parametrize("mode", ["bf16", "bf16_sr"])
def test_without_masters_one_micro_batch_takes_8_bytes_a_parameter_and_more_take_10(mode: str):
    for size, dtype, most in ((4, torch.bfloat16, 8), (1, torch.float32, 10)):
        ours, batch = stepper(tiny_recipe(f"precision={mode}", f"train.micro_batch_size={size}")), tiny_batch()
        ours.forward_backward(batch, targets_of(batch))
        assert all(parameter.grad is None for parameter in ours.model.parameters())
        assert {gradient.dtype for gradient in ours.weights.gradients.values()} == {dtype}
        alive = [*ours.weights.stored.values(), *ours.weights.gradients.values()]
        for weight in ours.weights.local.values():
            alive += [value for value in ours.optimizer.state[weight].values() if value.dim()]
        parameters = sum(parameter.numel() for parameter in ours.model.parameters())
        assert sum(tensor.nbytes for tensor in alive) == most * parameters
        ours.update(0.1, norms(ours)[0], 1.0)
        assert not ours.weights.gradients


@pytest.mark.parametrize("mode", ["fp32", "mixed", "bf16", "bf16_sr"])
def test_a_loaded_state_goes_on_bit_for_bit(mode: str):
    def step(which: EagerStepper, seed: int) -> float:
        batch = tiny_batch(seed)
        loss = which.forward_backward(batch, targets_of(batch))
        which.update(0.01, norms(which)[0], 1.0)
        return loss.item()

    first, second = (stepper(tiny_recipe(f"precision={mode}")) for _ in range(2))
    step(first, 0)
    second.load_state_dict(first.state_dict())
    assert [step(first, seed) for seed in (1, 2)] == [step(second, seed) for seed in (1, 2)]


def test_validation_leaves_no_gradient():
    ours, batch = stepper(tiny_recipe()), tiny_batch()
    loss = ours.evaluate(batch)
    torch.testing.assert_close(loss, ours.forward_backward(batch, 1))
    assert not ours.evaluate(batch).requires_grad


def test_a_norm_is_that_of_float64_also_over_millions_of_elements():
    # Added up one by one in float32 it would be off by 1e-4, and by another error for each way to cut a weight.
    weight = torch.randn(2048, 2048, generator=torch.Generator().manual_seed(0))
    found = sum_of_squares([weight, weight[0]], torch.device("cpu"))
    expected = weight.double().square().sum() + weight[0].double().square().sum()
    assert found.double() == pytest.approx(expected.item(), rel=1e-6)


def test_norms_of_bf16_tensors_are_added_up_in_float32():
    weight = torch.randn(2048, 700, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = sum_of_squares([weight, weight[0]], torch.device("cpu"))
    expected = weight.double().square().sum() + weight[0].double().square().sum()
    assert found.double() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("loss", "share"), [(2.5, 0.0), (float("nan"), float("nan")), (float("inf"), float("nan"))]
)
def test_of_tensor_parallel_peers_any_tells_of_a_loss_that_is_not_finite(loss: float, share: float):
    second = stepper(tiny_recipe("train.micro_batch_size=4"))
    second.layout = Layout(Ranks(tp_rank=1), zero=0)
    second.loss = lambda model, batch: torch.tensor(loss)
    assert float(second.evaluate(tiny_batch())) == pytest.approx(share, nan_ok=True)
