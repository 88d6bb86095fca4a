"""Training speed of a Mixtral against Transformers' in a plain PyTorch loop, on the same batches.

    python benchmarks/moe_speed.py             # some minutes on two cores
    python benchmarks/moe_speed.py --steps 8

Hidden 256, 4 layers, 8 experts of 512 of which a token has 2, vocabulary 8192, sequences of 512, micro-batches
of 4, fp32. Ours is the whole `train` path from one step's end to the next; the peer is given its batches
ready-made, with its `eager` and its `grouped_mm` experts. The three take turns step by step, each in a process
of its own, so that all see the machine in the same state. Quoted: medians, and the median of the ratios of
neighbouring steps.
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
PEERS = ("eager", "grouped_mm")
ROWS, INPUTS, OUTPUTS = 512, 256, 1024  # of the largest product of an expert with an even load


def recipe_words(steps: int, folder: str) -> list[str]:
    """The benchmark's recipe."""
    return [
        "recipe=llama_34m",
        "model.hidden_size=256",
        "model.intermediate_size=512",
        "model.num_hidden_layers=4",
        "model.num_attention_heads=4",
        "model.num_key_value_heads=4",
        "model.moe.num_local_experts=8",
        "data.document_mask=false",
        f"train.steps={steps}",
        "data.validation.fraction=0",
        f"run.dir={folder}",
        "platform=cpu",
    ]


def take_turn(seconds: float) -> None:
    """Tell the parent how long the step took and wait until it is this side's turn again."""
    print(f"{MARK}{seconds}", flush=True)
    sys.stdin.readline()


def run_ours(steps: int) -> None:
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
        train(load_recipe(recipe_words(steps, folder)), [Turns()])


def run_transformers(experts: str, steps: int) -> None:
    """A plain loop: AdamW, clipping, the router's loss, as the documentation has it."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    from trainwright.configs.compose import load_recipe
    from trainwright.configs.hf_config import to_hf
    from trainwright.trainers.data.stream import open_stream
    from trainwright.trainers.data.tokenizer import load_tokenizer

    recipe = load_recipe(recipe_words(steps, "."))
    with open_stream(recipe, load_tokenizer(recipe)) as stream:
        batches = [next(stream) for _ in range(steps)]
    torch.manual_seed(0)
    shape = to_hf(recipe.model, eos=None, bos=None, dtype="float32")
    shape |= {"use_cache": False, "output_router_logits": True}
    model = MixtralForCausalLM._from_config(MixtralConfig(**shape), experts_implementation=experts)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    for batch in batches:
        started = time.perf_counter()
        loss = model(input_ids=batch.tokens, labels=batch.tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        take_turn(time.perf_counter() - started)


def matmul_flops(threads: int) -> float:
    """The machine's own rate on an expert's largest matrix product, FLOP/s."""
    import torch

    torch.set_num_threads(threads)
    a, b = torch.randn(ROWS, INPUTS), torch.randn(INPUTS, OUTPUTS)
    times = []
    for _ in range(60):
        started = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - started)
    return 2 * ROWS * INPUTS * OUTPUTS / statistics.median(times)


class Side:
    """One side in a process of its own, which does a step whenever it is told to."""

    def __init__(self, side: str, steps: int, threads: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--side", side, "--steps", str(steps)],
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


def measure(steps: int, threads: int) -> dict[str, list[float]]:
    """Seconds of each counted step of all sides, which took turns step by step."""
    times: dict[str, list[float]] = {}
    sides = {}
    for name in ("ours", *PEERS):  # one after the other up to the end of its first step, where it waits
        sides[name] = Side(name, steps, threads)
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
    """Measure, or be one side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "moe_speed.json")
    parser.add_argument("--side", choices=("ours", *PEERS), help=argparse.SUPPRESS)
    args = parser.parse_args()

    if args.side == "ours":
        run_ours(args.steps)
        return
    if args.side:
        run_transformers(args.side, args.steps)
        return

    from trainwright.configs.compose import load_recipe
    from trainwright.trainers.flops import training_flops_per_token

    recipe = load_recipe(recipe_words(args.steps, "."))
    tokens = recipe.train.global_batch_size * recipe.train.seq_len
    flops = tokens * training_flops_per_token(recipe.model, recipe.train.seq_len)
    rates = [matmul_flops(args.threads)]
    times = measure(args.steps, args.threads)
    rates.append(matmul_flops(args.threads))
    ours = times["ours"]
    results = {
        "machine": {"cpu": platform.processor() or platform.machine(), "threads": args.threads},
        "load_average": [round(load, 1) for load in os.getloadavg()],
        "steps": args.steps,
        "tokens_per_s": {name: round(tokens / statistics.median(seconds)) for name, seconds in times.items()},
        "ratio": {
            peer: round(statistics.median(b / a for a, b in zip(ours, times[peer], strict=True)), 3)
            for peer in PEERS
        },
        "matmul_gflops": [round(rate / 1e9) for rate in rates],
        "ours_share_of_matmul_rate": round(flops / statistics.median(ours) / statistics.mean(rates), 3),
    }
    print(json.dumps(results), flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
