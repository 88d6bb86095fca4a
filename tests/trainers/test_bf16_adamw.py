import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trainwright.configs.schema import OptimConfig
from trainwright.models.counter_random import normal
from trainwright.models.storage import Piece
from trainwright.trainers import bf16_adamw
from trainwright.trainers.bf16_adamw import Bf16AdamW, compiled, halves_of, in_chunks, numbers_of
from trainwright.trainers.platform.cpu import Cpu

SHAPES = {"matrix": (96, 48), "vector": (80,)}
ROOT = Path(__file__).parents[2]


def draw(shape: tuple[int, ...], key: int) -> Tensor:
    rows, columns = shape if len(shape) == 2 else (1, *shape)
    return normal(key, torch.arange(rows), torch.arange(columns)).view(shape)


def pieces() -> dict[str, Piece]:
    return {name: Piece(draw(shape, 1).mul(0.02).bfloat16()) for name, shape in SHAPES.items()}


def gradients(step: int) -> dict[str, Tensor]:
    return {name: draw(shape, 100 + step) for name, shape in SHAPES.items()}


def train(optimizer: Bf16AdamW, steps: int, lr: float = 1e-3, first: int = 0) -> None:
    for step in range(first, first + steps):
        optimizer.update(gradients(step), lr, torch.tensor(1.5))


def reference(steps: int, lr: float = 1e-3) -> dict[str, Tensor]:
    """PyTorch's AdamW in float64 from the same numbers."""
    weights = {name: piece.values.double().requires_grad_() for name, piece in pieces().items()}
    optimizer = torch.optim.AdamW(
        [{"params": [weights["matrix"]]}, {"params": [weights["vector"]], "weight_decay": 0.0}],
        lr=lr,
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=0.1,
    )
    for step in range(steps):
        for name, gradient in gradients(step).items():
            weights[name].grad = gradient.double() / 1.5
        optimizer.step()
    return {name: weight.detach() for name, weight in weights.items()}


def test_to_nearest_it_is_adamw_to_bf16s_resolution():
    ours = Bf16AdamW(pieces(), OptimConfig(), seed=0, platform=Cpu(), stochastic=False)
    train(ours, 1)
    for name, weight in reference(1).items():
        assert torch.equal(ours.pieces[name].values, weight.bfloat16())


# At 1.5e-6 a weight loses about a float32's last bit, as it does in fp32.
@pytest.mark.parametrize(("lr", "error"), [(3e-4, 1e-4), (3e-5, 1e-3), (1.5e-6, 5e-2)])
def test_small_learning_rates_decay_weights_by_what_they_should(lr: float, error: float):
    weight = draw((256, 256), 1)  # in float32, so that nothing rounds the update after it
    before, zeros = weight.double(), torch.zeros_like(weight)
    numbers = numbers_of(1, lr, 0.1, OptimConfig(), None, Cpu())
    in_chunks(weight, zeros, zeros.clone(), zeros.clone(), None, numbers)
    lost = (before - weight.double()).abs().sum() / before.abs().sum()
    assert lost == pytest.approx(lr * 0.1, rel=error)


def test_stochastic_updates_follow_adamw_on_average():
    # Far below bf16's resolution at each weight: rounded to nearest, most weights don't move at all.
    expected, start = reference(10, lr=1e-6), pieces()
    moved = {name: expected[name] - start[name].values.double() for name in SHAPES}
    means = {name: torch.zeros_like(values) for name, values in moved.items()}
    for seed in range(60):
        ours = Bf16AdamW(pieces(), OptimConfig(), seed=seed, platform=Cpu(), stochastic=True)
        train(ours, 10, lr=1e-6)
        for name, mean in means.items():
            mean += (ours.pieces[name].values.double() - start[name].values.double()) / 60
    nearest = Bf16AdamW(pieces(), OptimConfig(), seed=0, platform=Cpu(), stochastic=False)
    train(nearest, 10, lr=1e-6)
    for name, mean in means.items():
        share = (mean * moved[name]).sum() / moved[name].square().sum()
        assert 0.9 < share < 1.1
        still = nearest.pieces[name].values == start[name].values
        assert still.double().mean() > 0.9


def test_the_second_moment_decays_though_its_steps_are_below_bf16s_resolution():
    for stochastic, lowest, highest in ((True, 0.4, 0.6), (False, 1.0, 1.0)):
        ours = Bf16AdamW(pieces(), OptimConfig(beta2=0.999), seed=0, platform=Cpu(), stochastic=stochastic)
        state = ours.state[ours.pieces["matrix"].values]
        state["exp_avg_sq"].fill_(1.0)
        for _ in range(693):  # 0.999 ** 693 is a half
            ours.update({"matrix": torch.zeros(SHAPES["matrix"])}, 0.0, None)
        assert lowest <= state["exp_avg_sq"].float().mean() <= highest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype):
    found = []
    for size in (1, 480, 1 << 20):
        monkeypatch.setattr(bf16_adamw, "CHUNK", size)
        ours = Bf16AdamW(pieces(), OptimConfig(), seed=0, platform=Cpu(), stochastic=True)
        for step in range(3):
            ours.update({name: g.to(dtype) for name, g in gradients(step).items()}, 1e-3, None)
        found.append(ours)
    for name in SHAPES:
        assert torch.equal(found[0].pieces[name].values, found[1].pieces[name].values)
        assert torch.equal(found[0].pieces[name].values, found[2].pieces[name].values)


def test_an_update_copies_its_numbers_to_the_device_once_for_each_decay(monkeypatch: pytest.MonkeyPatch):
    asked: list[tuple[int, float]] = []

    def counting(step: int, lr: float, decay: float, *others: Any) -> Tensor:
        asked.append((step, decay))
        return numbers_of(step, lr, decay, *others)

    monkeypatch.setattr(bf16_adamw, "numbers_of", counting)
    parts = {f"{name}.{i}": piece for i in range(3) for name, piece in pieces().items()}
    ours = Bf16AdamW(parts, OptimConfig(), seed=0, platform=Cpu(), stochastic=True)
    for _ in range(2):
        ours.update({name: torch.ones_like(part.values) for name, part in parts.items()}, 1e-3, None)
    assert asked == [(1, 0.1), (1, 0.0), (2, 0.1), (2, 0.0)]


def cut(piece: Piece, parts: int, dim: int) -> list[Piece]:
    """Copies of the parts, as if they lay on other ranks."""
    offsets = [0]
    chunks = piece.values.chunk(parts, dim)
    for chunk in chunks:
        offsets.append(offsets[-1] + chunk.shape[dim])
    return [
        Piece(chunk.clone(), *((offset, 0) if dim == 0 else (0, offset)))
        for chunk, offset in zip(chunks, offsets, strict=False)
    ]


@pytest.mark.parametrize(("name", "dim"), [("matrix", 0), ("matrix", 1), ("vector", 0)])
def test_parts_get_the_bits_of_the_whole(name: str, dim: int):
    whole = Bf16AdamW({name: pieces()[name]}, OptimConfig(), seed=3, platform=Cpu(), stochastic=True)
    parts = [
        Bf16AdamW({name: part}, OptimConfig(), seed=3, platform=Cpu(), stochastic=True)
        for part in cut(pieces()[name], 5, dim)
    ]
    for step in range(3):
        gradient = gradients(step)[name]
        whole.update({name: gradient}, 1e-3, None)
        for part, own in zip(parts, gradient.chunk(5, dim), strict=True):
            part.update({name: own}, 1e-3, None)
    assert torch.equal(torch.cat([part.pieces[name].values for part in parts], dim), whole.pieces[name].values)
    moments = [part.state[part.pieces[name].values]["exp_avg_sq"] for part in parts]
    assert torch.equal(torch.cat(moments, dim), whole.state[whole.pieces[name].values]["exp_avg_sq"])


def test_an_empty_part_counts_its_steps():
    empty = Piece(torch.empty(0, 8, dtype=torch.bfloat16), 16)
    ours = Bf16AdamW({"weight": empty}, OptimConfig(), seed=0, platform=Cpu(), stochastic=True)
    ours.update({"weight": torch.empty(0, 8)}, 1e-3, None)
    assert ours.state[empty.values]["step"] == 1


def test_seeds_and_steps_draw_other_bits():
    def weights(seed: int, step: int) -> Tensor:
        ours = Bf16AdamW(
            pieces(), OptimConfig(beta1=0.0, beta2=0.0), seed=seed, platform=Cpu(), stochastic=True
        )
        for state in ours.state.values():
            state["step"].fill_(step)
        ours.update(gradients(0), 1e-6, None)
        return ours.pieces["matrix"].values

    assert torch.equal(weights(0, 1), weights(0, 1))
    assert not torch.equal(weights(0, 1), weights(1, 1))
    assert not torch.equal(weights(0, 1), weights(0, 2))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stochastic", [True, False])
def test_the_compiled_update_gives_the_same_bits(dtype: torch.dtype, stochastic: bool):
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    kernel = compiled(torch.device("cpu"), dtype, stochastic)
    assert kernel is not None
    for shape in ((256, 256), (300, 1000), (1000, 77)):
        sides = []
        for update in (in_chunks, kernel):
            weight = draw(shape, 1).mul(0.02).bfloat16()
            # Zeros, subnormals and numbers that aren't any among the rest.
            weight[0, :6] = torch.tensor([0.0, -0.0, 1e-40, -1e-40, float("inf"), float("nan")])
            first, second = torch.zeros_like(weight), torch.zeros_like(weight)
            for step in range(1, 5):
                gradient = draw(shape, 100 + step).to(dtype)
                gradient[1, :3] = torch.tensor([0.0, 1e-30, float("nan")])
                numbers = numbers_of(step, 1e-3, 0.1, OptimConfig(), torch.tensor(1.7), Cpu())
                halves = halves_of(Piece(weight, 5, 9), step) if stochastic else None
                with torch.no_grad():
                    update(weight, gradient, first, second, halves, numbers)
            sides.append((weight, first, second))
        for eager, fused in zip(*sides, strict=True):
            assert torch.equal(eager.isnan(), fused.isnan())
            number = ~eager.isnan()
            assert torch.equal(eager[number], fused[number])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stochastic", [True, False])
def test_updates_of_any_shape_compile_nothing_more(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, stochastic: bool
):
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    monkeypatch.setattr(bf16_adamw, "COMPILED_FROM", 1)
    monkeypatch.setattr(bf16_adamw, "MATRIX_FROM", 64)
    shapes = [(8, 8), (300, 77), (77, 300), (1, 512), (512, 1), (512,)]
    parts = {str(shape): Piece(draw(shape, 1).bfloat16()) for shape in shapes}
    ours = Bf16AdamW(parts, OptimConfig(), 0, platform=Cpu(), stochastic=stochastic)
    assert compiled(torch.device("cpu"), dtype, stochastic) is not None
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(2):
            ones = {name: torch.ones_like(part.values, dtype=dtype) for name, part in parts.items()}
            ours.update(ones, 1e-3, torch.tensor(1.5))
            ours.update(ones, 1e-3, None)


@pytest.mark.slow
def test_without_a_compiler_it_runs_in_chunks_and_says_so():
    program = (
        "import torch; from trainwright.trainers.bf16_adamw import compiled; "
        "assert compiled(torch.device('cpu'), torch.float32, True) is None"
    )
    environment = {"PATH": "/nowhere", "CXX": "/nowhere/g++", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "AdamW runs without torch.compile" in done.stderr
