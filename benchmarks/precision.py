"""The same small Llama trained in every precision, at a learning rate whose updates bf16 can't resolve.

    python benchmarks/precision.py           # about ten minutes on two cores; writes the JSON and the plot
    python benchmarks/precision.py --draw    # the plot alone, from the JSON

A Llama of 0.95 M parameters on the standard library's sources, with the same batches. Its weights are of 0.1,
where two neighbouring bf16 numbers are 0.0005 apart, and a typical update is a fifth of that.
Besides, with beta2 = 0.999, which moments of AdamW profit from stochastic rounding. The plot needs matplotlib
(requirements/plots.txt).
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainwright.configs.compose import load_recipe
from trainwright.models.counter_random import mix
from trainwright.models.init import init_weights
from trainwright.models.llama import Llama
from trainwright.models.storage import whole_pieces
from trainwright.trainers import bf16_adamw
from trainwright.trainers.bf16_adamw import adamw_
from trainwright.trainers.data.batch import Batch
from trainwright.trainers.parallel.apply import Layout
from trainwright.trainers.parallel.ranks import Ranks
from trainwright.trainers.precision import PRECISIONS
from trainwright.trainers.rounding import bits_of, round_stochastically
from trainwright.trainers.steppers.eager import EagerStepper
from trainwright.trainers.train import train

RESULTS = Path(__file__).parent / "results" / "precision.json"
PLOT = Path(__file__).parents[1] / "docs" / "images" / "precision.png"
MODES = ("fp32", "mixed", "bf16", "bf16_sr")
SMOOTH = 20  # steps that a point of the plot is the mean of
WARM = 2  # turns that are not counted
ROWS: tuple[tuple[str, str, float], ...] = (  # precision, which moments are rounded stochastically, beta2
    *((mode, "second", 0.95) for mode in MODES),
    ("mixed", "second", 0.999),
    ("bf16_sr", "second", 0.999),
    ("bf16_sr", "none", 0.999),
    ("bf16_sr", "both", 0.999),
)


def recipe_words(mode: str, beta2: float, steps: int, folder: str) -> list[str]:
    """Two layers of width 128 whose initial gain is that of 0.02 at a width of 4096."""
    return [
        f"precision={mode}",
        "model.num_hidden_layers=2",
        "model.hidden_size=128",
        "model.intermediate_size=384",
        "model.num_attention_heads=2",
        "model.num_key_value_heads=2",
        "model.initializer_range=0.1",
        "model.tie_word_embeddings=false",
        "model.vocab_size=2048",
        "data.tokenizer.vocab_size=2048",
        "data.validation.fraction=0.02",
        "train.seq_len=64",
        "train.global_batch_size=8",
        "train.micro_batch_size=8",
        f"train.steps={steps}",
        f"train.validate_every={steps}",
        "train.validate_sequences=256",
        "optim.lr=5e-4",
        "optim.min_lr=5e-5",
        "optim.warmup_steps=20",
        f"optim.beta2={beta2}",
        "checkpoint.every=null",
        "monitor.every=50",
        "monitor.tensorboard=false",
        "monitor.sample_prompt=null",
        "health.check=false",
        "platform=cpu",
        f"run.dir={folder}",
        "run.name=run",
    ]


def rounding_moments(which: str) -> Callable[..., None]:
    """`adamw_` that rounds the moments otherwise: `none` of them stochastically, or `both`."""

    def update(
        weight: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, halves: Any, numbers: Tensor
    ) -> None:
        scale, _, rise1, keep2, rise2, *_ = numbers.unbind()
        grad, first = gradient.float() * scale, exp_avg.float()
        first = first + (grad - first) * rise1
        second = exp_avg_sq.float() * keep2 + grad * grad * rise2
        adamw_(weight, gradient, exp_avg, exp_avg_sq, halves, numbers)
        if which == "none":
            exp_avg_sq.copy_(second)
        else:
            exp_avg.copy_(round_stochastically(first, mix(bits_of(*halves))))

    return update


def run(words: list[str], moments: str) -> None:
    """Train in this process."""
    if moments != "second":
        setattr(bf16_adamw, "adamw_", rounding_moments(moments))  # noqa: B010
    train(load_recipe(words))


def train_in_a_process(mode: str, moments: str, beta2: float, steps: int) -> dict[str, Any]:
    """A run in a process of its own: its curve, and what it came to."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, __file__, "--moments", moments, "--run"]
        subprocess.run(
            [*words, *recipe_words(mode, beta2, steps, folder)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            check=True,
        )
        metrics = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
    return {
        "precision": mode,
        "stochastic_moments": moments if mode == "bf16_sr" else None,
        "beta2": beta2,
        "val_loss": round(metrics[-1]["val_loss"], 4),
        "loss": [round(line["loss"], 4) for line in metrics],
    }


def stepper_of(words: list[str], rows: int) -> tuple[EagerStepper, Batch]:
    """A stepper in this process, and random tokens for it."""
    recipe = load_recipe(words)
    model = Llama(recipe.model)
    model.to(PRECISIONS[recipe.precision.mode].kept_in)
    init_weights(whole_pieces(model), recipe.model, 0)
    layout, device = Layout(Ranks(), zero=0), torch.device("cpu")
    stepper = EagerStepper(model, lambda m, b: m(b.tokens, None, b.targets), recipe, layout, device)
    length = recipe.train.seq_len
    drawn = torch.randint(0, 2048, (rows, length + 1), generator=torch.Generator().manual_seed(0))
    documents, cursor = torch.zeros(rows, length, dtype=torch.int32), torch.zeros(rows, 1).numpy()
    return stepper, Batch(drawn[:, :-1], drawn[:, 1:], documents, cursor, 0.0)


def bytes_a_parameter(mode: str, micro_batches: int) -> float:
    """What is alive between backward and update: weights, gradients and moments, over the parameters."""
    words = [*recipe_words(mode, 0.95, 1, "."), f"train.micro_batch_size={8 // micro_batches}"]
    stepper, batch = stepper_of(words, 8)
    stepper.forward_backward(batch, batch.tokens.numel())
    weights = stepper.weights
    alive = [*stepper.model.parameters(), *weights.local.values(), *weights.gradients.values()]
    alive += [value for part in weights.local.values() for value in stepper.optimizer.state[part].values()]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in alive}
    return sum(storages.values()) / sum(parameter.numel() for parameter in stepper.model.parameters())


def throughput(turns: int) -> dict[str, dict[str, float]]:
    """Of the 5 M Llama, by precision: the modes take turns step by step. One thread."""
    torch.set_num_threads(1)
    modes = {mode: stepper_of(["train.seq_len=128", f"precision={mode}"], 4) for mode in MODES}
    times: dict[str, list[tuple[float, float]]] = {mode: [] for mode in modes}
    for _ in range(WARM + turns):
        for mode, (stepper, batch) in modes.items():
            started, worked = time.perf_counter(), time.process_time()
            stepper.forward_backward(batch, batch.tokens.numel())
            stepper.update(1e-4, stepper.squares()[0].sqrt(), 1.0)
            times[mode].append((time.perf_counter() - started, time.process_time() - worked))
    found = {}
    for mode, (_, batch) in modes.items():
        wall, busy = (statistics.median(column) for column in zip(*times[mode][WARM:], strict=True))
        found[mode] = {"tokens_per_s": round(batch.tokens.numel() / wall), "cpu_s_a_step": round(busy, 3)}
    return found


def draw(rows: list[Mapping[str, Any]], path: Path) -> None:
    """The training losses, smoothed, as differences from mixed precision's below."""
    from matplotlib import pyplot

    def smooth(losses: list[float]) -> list[float]:
        return [statistics.mean(losses[max(0, end - SMOOTH) : end]) for end in range(SMOOTH, len(losses) + 1)]

    curves = {row["precision"]: smooth(row["loss"]) for row in rows if row["beta2"] == 0.95}
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(5.6, 4.8), sharex=True, height_ratios=(3, 2))
    for mode, losses in curves.items():
        steps = range(SMOOTH, SMOOTH + len(losses))
        above.plot(steps, losses, linewidth=1, label=mode)
        differences = [a / b - 1 for a, b in zip(losses, curves["mixed"], strict=True)]
        below.plot(steps, [100 * difference for difference in differences], linewidth=1)
    above.set_ylabel("training loss")
    below.set_ylabel("% above mixed")
    below.set_xlabel("step")
    above.legend(frameon=False)
    for axis in (above, below):
        axis.grid(alpha=0.3)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main() -> None:
    """Train all, then draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--turns", type=int, default=8, help="of the modes, for the throughput")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--plot", type=Path, default=PLOT)
    parser.add_argument("--draw", action="store_true", help="only the plot, from the results")
    parser.add_argument("--moments", default="second", help=argparse.SUPPRESS)
    parser.add_argument("--run", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        run(args.run, args.moments)
        return
    if not args.draw:
        rows = []
        for mode, moments, beta2 in ROWS:
            rows.append(train_in_a_process(mode, moments, beta2, args.steps))
            print(json.dumps({**rows[-1], "loss": rows[-1]["loss"][-1]}), flush=True)
        alive = {mode: [round(bytes_a_parameter(mode, n), 2) for n in (1, 2)] for mode in MODES}
        machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        results = {"machine": machine, "steps": args.steps, "bytes_a_parameter": alive}
        results |= {"llama_5m": throughput(args.turns), "rows": rows}
        args.out.write_text(json.dumps(results, indent=1) + "\n")
    draw(json.loads(args.out.read_text())["rows"], args.plot)


if __name__ == "__main__":
    main()
