"""Poisoned batches in a small Llama's stream, and the monitor's answers to them side by side; what it costs.

    python benchmarks/stability.py             # about two minutes on two idle cores

A Llama of 0.3 M parameters on Python's standard library. Eight batches in a row have one token for all targets,
as broken data may have. Five runs: without them; and with them, told of only (`warn`), skipped (`skip`), rolled
back at once (`rollback`) and once the spike has lasted eight steps (`persistent`). Drawn losses are medians of
seven steps. Also what the monitor takes for a step, by itself.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainwright.configs.compose import load_recipe
from trainwright.configs.schema import StabilityConfig
from trainwright.models.cross_entropy import IGNORE
from trainwright.trainers.data.batch import Batch
from trainwright.trainers.data.cursor import GIVEN
from trainwright.trainers.stability import Monitor
from trainwright.trainers.steppers.eager import EagerStepper
from trainwright.trainers.train import train

HERE = Path(__file__).parent
IMAGE = HERE.parent / "docs" / "images" / "stability.png"
POISONED = range(170, 178)  # the numbers of the batches
TOKEN = 17
SMOOTH = 7  # steps
ANSWERS = {
    "no poison": [],
    "warn": [],
    "skip": ["stability.on_spike=skip"],
    "rollback": ["stability.on_spike=rollback", "stability.rollbacks=8"],
    "persistent": ["stability.on_persistent=rollback", "stability.persistent=7"],
}


def recipe_words(folder: str, steps: int) -> list[str]:
    """The run that all answers are held against."""
    shape = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4, "vocab_size": 2048}
    return [
        *(f"model.{key}={value}" for key, value in shape.items()),
        "data.tokenizer.vocab_size=2048",
        "train.seq_len=64",
        f"train.steps={steps}",
        "train.global_batch_size=8",
        "train.micro_batch_size=8",
        "train.validate_every=null",
        "optim.lr=3e-3",
        "optim.warmup_steps=100",
        "stability.relative_margin=2.0",
        "checkpoint.every=25",
        "health.check=false",
        "monitor.tensorboard=false",
        "monitor.sample_prompt=null",
        "monitor.every=50",
        f"run.dir={folder}",
        "platform=cpu",
    ]


@contextmanager
def poisoned(batches: range) -> Iterator[None]:
    """Within the body these batches of the stream have TOKEN for all targets."""
    compute = EagerStepper.forward_backward

    def forward_backward(stepper: EagerStepper, batch: Batch, target_tokens: int) -> Tensor:
        if int(batch.cursor[0, GIVEN]) in batches:
            batch = replace(batch, targets=torch.where(batch.targets == IGNORE, IGNORE, TOKEN))
        return compute(stepper, batch, target_tokens)

    EagerStepper.forward_backward = forward_backward  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        EagerStepper.forward_backward = compute  # type: ignore[method-assign]


def read(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(answer: str, folder: str, steps: int) -> dict[str, Any]:
    """One run with its figures and its curves."""
    name = answer.replace(" ", "_")
    with poisoned(range(0) if answer == "no poison" else POISONED):
        train(load_recipe([*recipe_words(folder, steps), *ANSWERS[answer], f"run.name={name}"]))
    metrics, events = read(Path(folder, name, "metrics.jsonl")), read(Path(folder, name, "events.jsonl"))
    out = len(POISONED) if any(event["event"] == "rollback" for event in events) else 0
    at = {line["step"] + (out if line["step"] >= POISONED.start else 0): line for line in metrics}
    after = [at[batch]["loss"] for batch in range(POISONED.stop, POISONED.stop + 50)]
    goodput = json.loads(Path(folder, name, "goodput.json").read_text())
    redone = Path(folder, name, "metrics.redone.jsonl")
    return {
        "val_loss": round(metrics[-1]["val_loss"], 4),
        "loss_on_the_next_50_batches": round(statistics.fmean(after), 4),
        "spikes": [
            [event["step"], event["length"], round(event["height"], 2)]
            for event in events
            if event["event"] == "spike"
        ],
        "warnings": [
            [event["step"], event["finding"], event["answer"]]
            for event in events
            if event["event"] == "warning"
        ],
        "rollbacks": sum(event["event"] == "rollback" for event in events),
        "steps_redone": len(read(redone)) if redone.exists() else 0,
        "utilisation": goodput["utilisation"],
        "median_step_s": round(statistics.median(line["step_time_s"] for line in metrics), 4),
        "batches": list(at),
        "losses": [round(line["loss"], 4) for line in metrics],
        "grad_norms": [round(line["grad_norm"], 4) for line in metrics],
    }


def microseconds_of_a_look(steps: int = 50_000) -> float:
    """What the monitor takes for a step on the host, in numbers that spike now and then."""
    monitor = Monitor(StabilityConfig(), 0, 3)
    started = time.perf_counter()
    for step in range(1, steps + 1):
        monitor.look(step, 2.0, 1.0 + 0.5 * (step % 50 == 0), 50.0 + step * 1e-4)
    return round((time.perf_counter() - started) / steps * 1e6, 2)


def smooth(values: list[float]) -> list[float]:
    """The running median of SMOOTH values."""
    reach = SMOOTH // 2
    return [statistics.median(values[max(0, at - reach) : at + reach + 1]) for at in range(len(values))]


def draw(rows: dict[str, dict[str, Any]]) -> None:
    """docs/images/stability.png: the losses and the gradient norms around the poison."""
    import matplotlib.pyplot as plt

    figure, (losses, norms) = plt.subplots(1, 2, figsize=(9.5, 3.4), dpi=75, layout="constrained")
    first = POISONED.start - 40
    for answer, row in rows.items():
        style = {"color": "0.6", "linewidth": 3} if answer == "no poison" else {"linewidth": 1.3}
        batches = row["batches"][first:]
        losses.plot(batches, smooth(row["losses"])[first:], label=answer, **style)
        norms.plot(batches, row["grad_norms"][first:], **style)
    norms.set_yscale("log")
    losses.set_title(f"Loss (median of {SMOOTH} steps, nats)")
    norms.set_title("Gradient norm")
    for axes in (losses, norms):
        axes.axvspan(POISONED.start, POISONED.stop - 1, color="tab:red", alpha=0.15)
        axes.set_xlabel("batch of the stream")
        axes.grid(alpha=0.3)
    losses.legend(frameon=False)
    IMAGE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(IMAGE)


def main() -> None:
    """Run all answers, and write the table and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "stability.json")
    args = parser.parse_args()
    rows = {}
    with tempfile.TemporaryDirectory(dir=".") as folder:
        for answer in ANSWERS:
            rows[answer] = run(answer, folder, args.steps)
            figures = {key: value for key, value in rows[answer].items() if not isinstance(value, list)}
            print(answer, json.dumps(figures), flush=True)
    draw(rows)
    machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    said = {"machine": machine, "poisoned": list(POISONED), "look_us": microseconds_of_a_look(), "runs": rows}
    args.out.write_text(json.dumps(said) + "\n")
    print(f"look_us={said['look_us']}")


if __name__ == "__main__":
    main()
