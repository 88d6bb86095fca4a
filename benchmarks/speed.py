"""Training speed against Transformers' Llama in a plain PyTorch loop, on the same batches.

    python benchmarks/speed.py                 # about five minutes on two cores
    python benchmarks/speed.py --steps 6

Ours is the whole `train` path (data, metrics, events, TensorBoard, report) from one step's end to the next;
the peer is given its batches ready-made. The two take turns step by step, each in a process of its own, so that
both see the machine in the same state. Quoted: medians, and the median of the ratios of neighbouring steps.
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
from pathlib import Path

WARM = 3  # steps that are not counted: allocators and caches fill
MARK = "seconds="
SIDES = ("ours", "transformers")
ROWS = [("fp32", False), ("mixed", False), ("fp32", True), ("mixed", True)]


def recipe_words(precision: str, masks: bool, steps: int, folder: str) -> list[str]:
    """The benchmark's recipe: the 34 M Llama, sequences of 512, micro-batches of 4, clip 1.0."""
    return [
        "recipe=llama_34m",
        f"precision={precision}",
        f"data.document_mask={str(masks).lower()}",
        f"train.steps={steps}",
        "data.validation.fraction=0",
        f"run.dir={folder}",
        "platform=cpu",
    ]


def take_turn(seconds: float) -> None:
    """Tell the parent how long the step took and wait until it is this side's turn again."""
    print(f"{MARK}{seconds}", flush=True)
    sys.stdin.readline()


def run_ours(precision: str, masks: bool, steps: int) -> None:
    """`trainwright train` as anyone runs it; a step is everything between two turns."""
    from trainwright.configs.compose import load_recipe
    from trainwright.trainers.observers.base import Metrics, Observer, Progress
    from trainwright.trainers.train import train

    class Turns(Observer):
        started = time.perf_counter()

        def on_step(self, progress: Progress, metrics: Metrics) -> None:
            take_turn(time.perf_counter() - self.started)
            self.started = time.perf_counter()

    with tempfile.TemporaryDirectory() as folder:
        train(load_recipe(recipe_words(precision, masks, steps, folder)), [Turns()])


def run_transformers(precision: str, masks: bool, steps: int) -> None:
    """A plain loop: autocast for bf16, AdamW, clipping, as the documentation has it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from trainwright.configs.compose import load_recipe
    from trainwright.configs.hf_config import to_hf
    from trainwright.trainers.data.stream import open_stream
    from trainwright.trainers.data.tokenizer import load_tokenizer

    recipe = load_recipe(recipe_words(precision, masks, steps, "."))
    with open_stream(recipe, load_tokenizer(recipe)) as stream:
        batches = [next(stream) for _ in range(steps)]
    torch.manual_seed(0)
    shape = to_hf(recipe.model, eos=None, bos=None, dtype="float32")
    model = LlamaForCausalLM(LlamaConfig(**shape | {"use_cache": False}))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    for batch in batches:
        started = time.perf_counter()
        mask = None
        if masks:  # what a packed batch needs: (batch, 1, length, length), true where a query may look
            same = batch.documents.unsqueeze(-1) == batch.documents.unsqueeze(-2)
            mask = same.tril().unsqueeze(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "mixed"):
            loss = model(input_ids=batch.tokens, attention_mask=mask, labels=batch.tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        take_turn(time.perf_counter() - started)


def matmul_flops(precision: str, threads: int) -> float:
    """The machine's own rate on the model's largest matrix product, FLOP/s."""
    import torch

    torch.set_num_threads(threads)
    dtype = torch.bfloat16 if precision == "mixed" else torch.float32
    a, b = torch.randn(2048, 512).to(dtype), torch.randn(512, 2752).to(dtype)
    times = []
    for _ in range(30):
        started = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - started)
    return 2 * 2048 * 512 * 2752 / statistics.median(times)


class Side:
    """One side in a process of its own, which does a step whenever it is told to."""

    def __init__(self, side: str, precision: str, masks: bool, steps: int, threads: int) -> None:
        words = [sys.executable, __file__, "--side", side, "--precision", precision, "--steps", str(steps)]
        self.process = subprocess.Popen(
            [*words, *(["--masks"] if masks else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )

    def seconds(self) -> float:
        """Wait for the step that is under way: how long it took."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(MARK):
                return float(line.removeprefix(MARK))
        raise RuntimeError(f"{self.process.args!r} ended with {self.process.wait()}")

    def go(self) -> None:
        """Let the next step begin."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()


def measure(precision: str, masks: bool, steps: int, threads: int) -> dict[str, list[float]]:
    """Seconds of each counted step of both sides, which took turns step by step."""
    times: dict[str, list[float]] = {}
    sides = {}
    for name in SIDES:  # one after the other up to the end of its first step, where it waits
        sides[name] = Side(name, precision, masks, steps, threads)
        times[name] = [sides[name].seconds()]
    for _ in range(steps - 1):
        for name, side in sides.items():
            side.go()
            times[name].append(side.seconds())
    for side in sides.values():
        side.process.kill()
        side.process.wait()
    return {name: seconds[WARM:] for name, seconds in times.items()}


def main() -> None:
    """Measure the table, or be one side of a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "speed.json")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--precision", default="fp32", help=argparse.SUPPRESS)
    parser.add_argument("--masks", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()

    if args.side:
        run = run_ours if args.side == "ours" else run_transformers
        run(args.precision, args.masks, args.steps)
        return

    from trainwright.configs.compose import load_recipe
    from trainwright.trainers.flops import training_flops_per_token

    recipe = load_recipe(["recipe=llama_34m"])
    tokens = recipe.train.global_batch_size * recipe.train.seq_len
    flops = tokens * training_flops_per_token(recipe.model, recipe.train.seq_len)
    rows = []
    for precision, masks in ROWS:
        rates = [matmul_flops(precision, args.threads)]
        times = measure(precision, masks, args.steps, args.threads)
        rates.append(matmul_flops(precision, args.threads))
        ours, peer = times["ours"], times["transformers"]
        row = {
            "precision": precision,
            "document_masks": masks,
            "ours_tokens_per_s": round(tokens / statistics.median(ours)),
            "transformers_tokens_per_s": round(tokens / statistics.median(peer)),
            "ratio": round(statistics.median(b / a for a, b in zip(ours, peer, strict=True)), 3),
            "ratio_of_totals": round(sum(peer) / sum(ours), 3),
            "matmul_gflops": [round(rate / 1e9) for rate in rates],
            "ours_share_of_matmul_rate": round(flops / statistics.median(ours) / statistics.mean(rates), 3),
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    machine = {"cpu": platform.processor() or platform.machine(), "threads": args.threads}
    args.out.write_text(json.dumps({"machine": machine, "steps": args.steps, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
