"""Training speed against Transformers' Llama in a plain PyTorch loop, on the same batches.

    python benchmarks/speed.py                      # about ten minutes on two cores
    python benchmarks/speed.py --rounds 1 --steps 4

Ours is the whole `train` path (data, metrics, events, TensorBoard, report), timed from one step's end to the
next; the peer is given its batches ready-made. Both run by turns, each time in a fresh process; a round's
figure is its median step, the ratio is taken round by round, and the median of the ratios is quoted.
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
from itertools import pairwise
from pathlib import Path
from typing import Any

WARM = 2  # steps of a process that are not counted: allocators and caches fill
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


def run_ours(precision: str, masks: bool, steps: int) -> list[float]:
    """Seconds from each step's end to the next one's through `trainwright train`."""
    from trainwright.configs.compose import load_recipe
    from trainwright.trainers.observers.base import Metrics, Observer, Progress
    from trainwright.trainers.train import train

    ends: list[float] = []

    class Clock(Observer):
        def on_step(self, progress: Progress, metrics: Metrics) -> None:
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        train(load_recipe(recipe_words(precision, masks, steps, folder)), [Clock()])
    return [after - before for before, after in pairwise(ends)]


def run_transformers(precision: str, masks: bool, steps: int) -> list[float]:
    """Seconds of each step of a plain loop: autocast for bf16, AdamW, clipping, as the documentation has it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from trainwright.configs.compose import load_recipe
    from trainwright.trainers.data.stream import open_stream
    from trainwright.trainers.data.tokenizer import load_tokenizer

    recipe = load_recipe(recipe_words(precision, masks, steps, "."))
    with open_stream(recipe, load_tokenizer(recipe)) as stream:
        batches = [next(stream) for _ in range(steps)]
    shape = recipe.model
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_hidden_layers=shape.num_hidden_layers,
            num_attention_heads=shape.num_attention_heads,
            max_position_embeddings=shape.max_position_embeddings,
            use_cache=False,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    times = []
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
        times.append(time.perf_counter() - started)
    return times


def matmul_flops(precision: str) -> float:
    """The machine's own rate on the model's largest matrix product, FLOP/s."""
    import torch

    dtype = torch.bfloat16 if precision == "mixed" else torch.float32
    a, b = torch.randn(2048, 512).to(dtype), torch.randn(512, 2752).to(dtype)
    times = []
    for _ in range(30):
        started = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - started)
    return 2 * 2048 * 512 * 2752 / statistics.median(times)


def child(side: str, precision: str, masks: bool, steps: int, threads: int) -> dict[str, Any]:
    """Run one side in a process of its own."""
    words = [sys.executable, __file__, "--side", side, "--precision", precision, "--steps", str(steps)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [*words, *(["--masks"] if masks else [])], capture_output=True, text=True, env=environment, check=True
    )
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def main() -> None:
    """Run the table, or one side of one round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "speed.json")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--precision", default="fp32", help=argparse.SUPPRESS)
    parser.add_argument("--masks", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()

    if args.side:
        run = run_ours if args.side == "ours" else run_transformers
        times = run(args.precision, args.masks, args.steps)
        print(json.dumps({"seconds": statistics.median(times[WARM:]), "matmul": matmul_flops(args.precision)}))
        return

    from trainwright.configs.compose import load_recipe
    from trainwright.trainers.flops import training_flops_per_token

    recipe = load_recipe(["recipe=llama_34m"])
    tokens = recipe.train.global_batch_size * recipe.train.seq_len
    flops = tokens * training_flops_per_token(recipe.model, recipe.train.seq_len)
    rows = []
    for precision, masks in ROWS:
        rounds: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
        for _ in range(args.rounds):
            for side in SIDES:
                rounds[side].append(child(side, precision, masks, args.steps, args.threads))
        ours, peer = ([r["seconds"] for r in rounds[side]] for side in SIDES)
        row = {
            "precision": precision,
            "document_masks": masks,
            "ours_tokens_per_s": round(tokens / statistics.median(ours)),
            "transformers_tokens_per_s": round(tokens / statistics.median(peer)),
            "ratio": round(statistics.median(b / a for a, b in zip(ours, peer, strict=True)), 3),
            "ratios": [round(b / a, 3) for a, b in zip(ours, peer, strict=True)],
        }
        rate = statistics.median(r["matmul"] for side in SIDES for r in rounds[side])
        row["matmul_gflops"] = round(rate / 1e9)
        row["ours_share_of_matmul_rate"] = round(flops / statistics.median(ours) / rate, 3)
        rows.append(row)
        print(json.dumps(row), flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    machine = {"cpu": platform.processor() or platform.machine(), "threads": args.threads}
    args.out.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
