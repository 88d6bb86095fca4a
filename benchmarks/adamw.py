"""A step of AdamW in bf16: ours, PyTorch's fused one, and torchao's with stochastic rounding.

    python benchmarks/adamw.py                 # about two minutes on two cores
    pip install --no-deps torchao==0.18.0      # before it, for that row

50 M parameters in 24 matrices, gradients in bf16. The sides take turns step by
step in one process, so that all see the machine in the same state. Quoted: medians over the steps, and medians
of the ratios of neighbouring steps; of the processor's time too, which other work on the machine touches less.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from trainwright.configs.schema import OptimConfig
from trainwright.models.storage import Piece
from trainwright.trainers.bf16_adamw import Bf16AdamW
from trainwright.trainers.platform.cpu import Cpu

SHAPES = ((2048, 1024),) * 24
WARM = 2  # steps that are not counted: compilers, caches
LR = 1e-4
IMAGE = Path(__file__).parents[1] / "docs" / "images" / "adamw.png"
TITLES = {
    "ours": "bf16_sr",
    "ours_nearest": "bf16",
    "torch_fused": "PyTorch's fused AdamW, to nearest",
    "torchao": "torchao's AdamW with bf16_stochastic_round",
    "ours_in_chunks": "bf16_sr where nothing is compiled",
}

Step = Callable[[], None]
State = list[torch.Tensor]  # all that is alive between two steps, gradients too


def weights() -> list[torch.Tensor]:
    """The parameters, N(0, 0.02) in bf16, with gradients."""
    torch.manual_seed(0)
    made = [torch.randn(shape).mul_(0.02).bfloat16().requires_grad_() for shape in SHAPES]
    for weight in made:
        weight.grad = torch.randn_like(weight)
    return made


def ours(stochastic: bool, chunks: bool) -> tuple[Step, State]:
    """One of this project's: all on a single rank."""
    parts = weights()
    gradients = {str(i): w.grad for i, w in enumerate(parts) if w.grad is not None}
    pieces = {str(i): Piece(weight.detach()) for i, weight in enumerate(parts)}
    optimizer = Bf16AdamW(pieces, OptimConfig(), seed=0, platform=Cpu(), stochastic=stochastic)
    if chunks:
        optimizer.compiles = False
    moments = [value for state in optimizer.state.values() for value in state.values()]
    return lambda: optimizer.update(gradients, LR, None), [*parts, *gradients.values(), *moments]


def theirs(make: Callable[[list[torch.Tensor]], torch.optim.Optimizer]) -> tuple[Step, State]:
    """A PyTorch optimizer over the same; its state is made in the first step."""
    parts = weights()
    optimizer = make(parts)
    optimizer.step()
    moments = [
        value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)
    ]
    return optimizer.step, [*parts, *(w.grad for w in parts if w.grad is not None), *moments]


def torch_fused() -> tuple[Step, State]:
    """PyTorch's."""
    settings: dict[str, Any] = {"lr": LR, "betas": (0.9, 0.95), "weight_decay": 0.1, "fused": True}
    return theirs(lambda parts: torch.optim.AdamW(parts, **settings))


def torchao() -> tuple[Step, State]:
    """torchao's; ImportError where it isn't installed."""
    from torchao.optim import _AdamW

    settings: dict[str, Any] = {"lr": LR, "betas": (0.9, 0.95), "weight_decay": 0.1}
    return theirs(lambda parts: _AdamW(parts, bf16_stochastic_round=True, **settings))


SIDES: dict[str, Callable[[], tuple[Step, State]]] = {
    "ours": lambda: ours(stochastic=True, chunks=False),
    "ours_nearest": lambda: ours(stochastic=False, chunks=False),
    "torch_fused": torch_fused,
    "torchao": torchao,
    "ours_in_chunks": lambda: ours(stochastic=True, chunks=True),
}


def measure(steps: int) -> dict[str, Any]:
    """Each side's seconds a step and bytes a parameter, and how its steps compare with ours."""
    elements = sum(rows * columns for rows, columns in SHAPES)
    running: dict[str, Step] = {}
    sizes: dict[str, float] = {}
    for name, make in SIDES.items():
        try:
            running[name], alive = make()
        except ImportError as error:
            print(f"{name} is left out: {error}")
            continue
        sizes[name] = sum(tensor.nbytes for tensor in alive) / elements
    times: dict[str, list[float]] = {name: [] for name in running}
    busy: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(WARM + steps):
        for name, step in running.items():
            started, worked = time.perf_counter(), time.process_time()
            step()
            times[name].append(time.perf_counter() - started)
            busy[name].append(time.process_time() - worked)
    return {
        "parameters": elements,
        "steps": steps,
        "sides": {
            name: {
                "seconds": round(statistics.median(times[name][WARM:]), 4),
                "fastest": round(min(times[name][WARM:]), 4),
                "times_ours": _ratio(times, name),
                "cpu_seconds": round(statistics.median(busy[name][WARM:]), 4),
                "cpu_times_ours": _ratio(busy, name),
                "bytes_a_parameter": round(sizes[name], 3),
            }
            for name in running
        },
    }


def _ratio(times: dict[str, list[float]], name: str) -> float:
    """How many times as long as ours of the same turn."""
    turns = zip(times["ours"][WARM:], times[name][WARM:], strict=True)
    return round(statistics.median(seconds / own for own, seconds in turns), 3)


def draw(sides: dict[str, Any]) -> None:
    """docs/images/adamw.png: the seconds of a step as bars."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 2.2), dpi=75, layout="constrained")
    axes.barh([TITLES[name] for name in sides], [side["seconds"] for side in sides.values()], color="tab:blue")
    axes.invert_yaxis()
    axes.set_title("A step over 50 M parameters, s")
    IMAGE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(IMAGE)
    plt.close(figure)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "adamw.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    machine = {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": args.threads,
    }
    results = {"machine": machine, "torch": torch.__version__, **measure(args.steps)}
    for name, side in results["sides"].items():
        print(f"{TITLES[name]}: {json.dumps(side)}")
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    draw(results["sides"])


if __name__ == "__main__":
    main()
