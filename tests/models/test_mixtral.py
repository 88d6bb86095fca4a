import math

import pytest
import torch

from trainwright.configs.compose import load_recipe
from trainwright.configs.schema import ModelConfig, MoeConfig
from trainwright.models.attention import Blockwise, Sdpa
from trainwright.models.cross_entropy import IGNORE
from trainwright.models.decoder import decoder
from trainwright.models.generate import generate
from trainwright.models.init import init_weights, initial_norm
from trainwright.models.mixtral import MEASURES, Mixtral
from trainwright.models.storage import Piece, whole_pieces


def config(**changes) -> ModelConfig:
    usual = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 256, "num_hidden_layers": 2}
    usual |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    usual |= {"moe": MoeConfig(num_local_experts=4)}
    return ModelConfig(**usual | changes)


def filled(shape: ModelConfig, kernel=None) -> Mixtral:
    model = decoder(shape, kernel)
    assert isinstance(model, Mixtral)
    init_weights(whole_pieces(model), shape, 0)
    return model


def some_tokens(length: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    words = torch.randint(96, (2, length + 1), generator=torch.Generator().manual_seed(1))
    targets = words[:, 1:].clone()
    targets[0, 5:] = IGNORE
    return words[:, :-1], targets


def gradients(model: Mixtral) -> dict[str, torch.Tensor]:
    tokens, targets = some_tokens()
    loss = model(tokens, None, targets)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()} | {"loss": loss.detach()}


def test_coalesced_and_separate_experts_start_and_learn_alike():
    coalesced, separate = (gradients(filled(config(coalesce=coalesce))) for coalesce in (True, False))
    torch.testing.assert_close(coalesced["loss"], separate["loss"])
    for name in separate.keys() & coalesced.keys():
        torch.testing.assert_close(coalesced[name], separate[name], rtol=1e-3, atol=1e-4, msg=name)


def test_initial_values_are_drawn_by_the_expert_not_by_the_stack():
    two, four = (filled(config(moe=MoeConfig(num_local_experts=n))) for n in (2, 4))
    for name in ("gate_up_proj", "down_proj"):
        whole = four.get_parameter(f"layers.1.mlp.experts.{name}.weight")
        assert torch.equal(whole[:2], two.get_parameter(f"layers.1.mlp.experts.{name}.weight"))
        assert not torch.equal(whole[0], whole[1])


@pytest.mark.parametrize("coalesce", [True, False])
def test_a_block_of_a_stack_is_filled_as_in_the_whole(coalesce):
    shape = config(coalesce=coalesce)
    for name, whole in filled(shape).named_parameters():
        if whole.dim() == 3:
            part = torch.empty(2, whole.shape[1] // 2, whole.shape[2] // 2)
            row, column = whole.shape[1] // 4, whole.shape[2] // 4
            init_weights({name: Piece(part, row, column, expert=1)}, shape, 0)
            height, width = part.shape[1:]
            assert torch.equal(part, whole[1:3, row : row + height, column : column + width]), name


def test_the_initial_norm_is_the_one_to_expect():
    shape = config(scaled_init=True, hidden_size=128)
    norm = math.sqrt(sum(p.double().square().sum().item() for p in filled(shape).parameters()))
    assert norm == pytest.approx(initial_norm(shape), rel=0.005)


def test_the_loss_is_the_tokens_and_the_gradient_the_routers_too():
    weights = {"router_aux_loss_coef": 0.3, "router_z_loss_coef": 0.2}
    both = filled(config(moe=MoeConfig(num_local_experts=4, **weights)))
    neither = filled(config(moe=MoeConfig(num_local_experts=4, load_balancing="none", router_z_loss_coef=0.0)))
    tokens, targets = some_tokens()
    loss, plain = both(tokens, None, targets), neither(tokens, None, targets)
    assert torch.equal(loss, plain)

    # By hand: the layers' losses times the micro-batch's target tokens.
    routers = [layer.mlp.gate for layer in both.layers]
    seen = {}
    hooks = [
        gate.register_forward_hook(lambda gate, _, out: seen.update({gate: 0.3 * out.aux + 0.2 * out.z}))
        for gate in routers
    ]
    count = int((targets != IGNORE).sum())
    again = both(tokens, None, targets)
    for hook in hooks:
        hook.remove()
    names = dict(both.named_parameters())
    expected = torch.autograd.grad(
        sum(seen.values()) * count, names.values(), allow_unused=True, retain_graph=True
    )
    got = torch.autograd.grad(again, names.values())
    alone = torch.autograd.grad(plain, neither.parameters())
    for name, ours, routed, of_tokens in zip(names, got, expected, alone, strict=True):
        total = of_tokens if routed is None else of_tokens + routed
        torch.testing.assert_close(ours, total, rtol=1e-4, atol=1e-4, msg=name)
    assert any(routed is not None and routed.norm() > 0.01 for routed in expected)


def test_a_pass_with_gradients_is_measured_and_one_without_is_not():
    model = filled(config(moe=MoeConfig(num_local_experts=4, capacity=1.0)))
    tokens, targets = some_tokens()
    count = int((targets != IGNORE).sum())
    model(tokens, None, targets)
    once = model.take_measured()
    assert tuple(once) == MEASURES
    assert 0.0 < float(once["dropped"]) / count < 0.5
    assert 1.0 < float(once["expert_load"]) / count < 4.0
    model(tokens, None, targets)
    with torch.no_grad():
        model(tokens, None, targets)
    model(tokens, None, targets)
    assert {name: pytest.approx(2 * float(value)) for name, value in once.items()} == model.take_measured()


@pytest.mark.parametrize(("window", "length"), [(5, 300), (300, 300), (None, 300), (33, 600)])
def test_kernels_see_the_same_window(window, length):
    shape = config(sliding_window=window, max_position_embeddings=1024)
    tokens, targets = some_tokens(length)
    documents = (torch.arange(length) > length // 3).int().expand(2, -1).contiguous()
    for given in (None, documents):
        losses = [filled(shape, kernel(window))(tokens, given, targets) for kernel in (Sdpa, Blockwise)]
        torch.testing.assert_close(*losses)
    hidden = filled(config(max_position_embeddings=1024))(tokens, None, targets)
    assert torch.equal(hidden, filled(shape)(tokens, None, targets)) == (window in (None, 300))


@torch.no_grad()
def test_decoding_sees_the_window_that_training_does():
    model = filled(config(sliding_window=6))
    prompt = some_tokens(20)[0]
    written = generate(model, prompt, 10)
    for length in range(20, 30):
        assert torch.equal(model(written[:, :length])[:, -1].argmax(-1), written[:, length])


@pytest.mark.parametrize(
    ("name", "total", "active"), [("mixtral_8x7b", 46.7e9, 12.9e9), ("mixtral_8x22b", 140.6e9, 39.1e9)]
)
def test_published_sizes(name, total, active):
    shape = load_recipe([f"model={name}", "data.tokenizer.vocab_size=4096"], planned=True).model
    with torch.device("meta"):
        model = decoder(shape)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    idle = 1 - shape.moe.num_experts_per_tok / shape.moe.num_local_experts
    resting = sum(size * idle for name, size in sizes.items() if ".experts." in name)
    assert sum(sizes.values()) == pytest.approx(total, rel=0.002)
    assert sum(sizes.values()) - resting == pytest.approx(active, rel=0.003)
