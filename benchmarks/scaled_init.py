"""What scaled initialisation does to a deep narrow model: losses and gradient norms with and without it.

    python benchmarks/scaled_init.py           # about five minutes on one core; writes the JSON and the plot
    python benchmarks/scaled_init.py --draw    # the plot alone, from the JSON

48 layers of width 64 on the standard library's sources, with the same batches. The projections whose results
are added to the residual stream start with initializer_range, or with 1 / sqrt(2 * 48) of it
(`model.scaled_init`). Each learning rate is tried with both. The plot needs matplotlib
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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "scaled_init.json"
PLOT = Path(__file__).parents[1] / "docs" / "images" / "scaled_init.png"
RATES = (4e-3, 1.6e-2)
SIDES = {"plain": False, "scaled": True}
EARLY, LATE = 20, 20  # steps at either end that the table quotes


def recipe_words(scaled: bool, rate: float, steps: int, folder: str) -> list[str]:
    """48 layers of width 64; a warm-up that is short, for the start is what is asked about."""
    return [
        "model.num_hidden_layers=48",
        "model.hidden_size=64",
        "model.intermediate_size=192",
        "model.num_attention_heads=2",
        "model.num_key_value_heads=2",
        "model.initializer_range=0.16",  # gives this width the gain of 0.02 at a width of 4096
        "model.tie_word_embeddings=false",
        f"model.scaled_init={str(scaled).lower()}",
        "train.seq_len=128",
        "train.global_batch_size=8",
        f"train.steps={steps}",
        f"train.validate_every={steps}",
        f"optim.lr={rate}",
        f"optim.min_lr={rate / 10}",
        "optim.warmup_steps=10",
        "checkpoint.every=null",
        "monitor.every=20",
        "monitor.tensorboard=false",
        "monitor.sample_prompt=null",
        "health.check=false",
        "platform=cpu",
        f"run.dir={folder}",
        "run.name=run",
    ]


def train(scaled: bool, rate: float, steps: int) -> dict[str, Any]:
    """A run in a process of its own: its curves and its initial norm."""
    with tempfile.TemporaryDirectory() as folder:
        words = recipe_words(scaled, rate, steps, folder)
        subprocess.run(
            [sys.executable, "-m", "trainwright", "train", *words],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            check=True,
        )
        run = Path(folder, "run")
        metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    (norm,) = [event for event in events if event["event"] == "initial_norm"]
    curves = {name: [round(line[name], 5) for line in metrics] for name in ("loss", "grad_norm")}
    return {
        "initial_norm": {name: round(norm[name], 3) for name in ("param_norm", "expected")},
        "first_grad_norm": curves["grad_norm"][0],
        f"largest_grad_norm_of_{EARLY}": max(curves["grad_norm"][:EARLY]),
        f"median_grad_norm_of_the_last_{LATE}": round(statistics.median(curves["grad_norm"][-LATE:]), 3),
        f"loss_of_the_last_{LATE}": round(statistics.mean(curves["loss"][-LATE:]), 4),
        "val_loss": round(metrics[-1]["val_loss"], 4),
        **curves,
    }


def as_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table of a page; gradient norms of the first step, and the median of the last ones."""
    titles = ("learning rate", "`scaled_init`", "initial norm", "first gradient norm", "last", "validation")
    lines = [f"| {' | '.join(titles)} |", "|--:|---|--:|--:|--:|--:|"]
    for row in rows:
        cells = (
            f"{row['lr']:g}",
            str(SIDES[row["side"]]).lower(),
            f"{row['initial_norm']['param_norm']:.1f}",
            f"{row['first_grad_norm']:.1f}",
            f"{row[f'median_grad_norm_of_the_last_{LATE}']:.2f}",
            f"{row['val_loss']:.3f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Losses above, gradient norms below, a column for each learning rate."""
    from matplotlib import pyplot

    rates = list(dict.fromkeys(row["lr"] for row in rows))
    figure, axes = pyplot.subplots(
        2, len(rates), figsize=(3.1 * len(rates), 4.6), sharex=True, sharey="row", squeeze=False
    )
    for row in rows:
        column = rates.index(row["lr"])
        for axis, name in zip(axes[:, column], ("loss", "grad_norm"), strict=True):
            axis.plot(range(1, len(row[name]) + 1), row[name], linewidth=1, label=row["side"])
            axis.grid(alpha=0.3)
        axes[0, column].set_title(f"learning rate {row['lr']:g}", fontsize=9)
        axes[1, column].set_xlabel("step")
    axes[1, 0].set_yscale("log")
    axes[0, 0].set_ylabel("loss")
    axes[1, 0].set_ylabel("gradient norm")
    axes[0, 0].legend(frameon=False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main() -> None:
    """Train all, then draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--plot", type=Path, default=PLOT)
    parser.add_argument("--draw", action="store_true", help="only the plot, from the results")
    args = parser.parse_args()
    if not args.draw:
        rows = []
        for rate in args.rates:
            for side, scaled in SIDES.items():
                rows.append({"side": side, "lr": rate} | train(scaled, rate, args.steps))
                print(json.dumps({k: v for k, v in rows[-1].items() if not isinstance(v, list)}), flush=True)
        machine = {"cpu": platform.processor() or platform.machine(), "threads": 1}
        args.out.write_text(json.dumps({"machine": machine, "steps": args.steps, "rows": rows}) + "\n")
    rows = json.loads(args.out.read_text())["rows"]
    print(as_markdown(rows))
    draw(rows, args.plot)


if __name__ == "__main__":
    main()
