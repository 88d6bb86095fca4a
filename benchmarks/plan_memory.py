"""The memory of a step by arithmetic, beside that of a real step: every tensor's bytes, by kind.

    python benchmarks/plan_memory.py                        # about two minutes on two cores
    python benchmarks/plan_memory.py --docs docs/planning.md    # no run: the results, as a table, into a page

The 5 M Llama on one process, and on two ranks over gloo that share data or layers. What is measured is what
operators' results take, tensor by tensor (`trainers/plan/memory_tracker.py`), not what the process has: that
depends on the allocator. The rank that holds most is quoted.
"""

import argparse
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

from trainwright.configs.compose import load_recipe
from trainwright.configs.degrees import resolve_degrees, world_size
from trainwright.trainers.parallel.ranks import open_ranks
from trainwright.trainers.plan.memory import Memory, memory_of
from trainwright.trainers.plan.rehearsal import memory_of_kinds
from trainwright.trainers.plan.rehearsal_step import Blank, watch_steps
from trainwright.trainers.platform.cpu import Cpu

RESULTS = Path(__file__).parent / "results" / "plan_memory.json"
MARK = "measured="
BEGIN, END = "<!-- memory -->", "<!-- /memory -->"
BASE = "platform=cpu model.num_hidden_layers=4 model.tie_word_embeddings=false"
WAYS = [
    *(
        f"precision={precision} train.activation_checkpointing={mode}"
        for precision in ("fp32", "mixed", "bf16_sr")
        for mode in ("none", "selective", "full")
    ),
    "train.micro_batch_size=2",
    "precision=bf16_sr train.micro_batch_size=2",
]
SHARED = [
    "parallel.zero=0",
    "parallel.zero=1 precision=mixed train.micro_batch_size=2",
    "parallel.zero=2 precision=bf16_sr train.micro_batch_size=2",
    "parallel.zero=3",
    "parallel.zero=3 precision=mixed",
    "parallel.zero=3 precision=bf16_sr train.activation_checkpointing=selective",
    "parallel.tp=2",
    "parallel.tp=2 parallel.sp=false",
    "parallel.tp=2 train.activation_checkpointing=full",
    "parallel.pp=2 train.micro_batch_size=2",
]
ROWS = {1: WAYS, 2: SHARED}  # by the number of ranks


def measure(words: str) -> tuple[Memory, Memory]:
    """By arithmetic and measured, on this rank."""
    recipe = load_recipe([*BASE.split(), *words.split()])
    degrees = resolve_degrees(recipe.parallel, world_size())
    rows = recipe.train.global_batch_size // degrees.data
    with open_ranks(recipe.parallel, Cpu()) as ranks:
        watched = watch_steps(Blank(recipe, ranks), Cpu(), [rows, rows])
        moments = map(memory_of_kinds, watched.by_moment.values())
        return memory_of(recipe, degrees, ranks.pp_rank), max(moments, key=lambda memory: memory.total)


def run_rank(ranks: int) -> None:
    """All rows of so many ranks; each rank says its own."""
    warnings.simplefilter("ignore")
    for words in ROWS[ranks]:
        calculated, measured = measure(words)
        said = {"words": words, "calculated": calculated._asdict(), "measured": measured._asdict()}
        print(MARK + json.dumps(said), flush=True)


def run(ranks: int) -> list[dict[str, Any]]:
    """The rows of so many ranks, of the rank that measured most."""
    alone = [sys.executable]
    several = [*alone, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [*(several if ranks > 1 else alone), __file__, "--ranks", str(ranks)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise RuntimeError(f"{done.stderr}\n{command!r} ended with {done.returncode}")
    said = [json.loads(line.removeprefix(MARK)) for line in done.stdout.splitlines() if line.startswith(MARK)]
    rows = []
    for words in ROWS[ranks]:
        own = [one for one in said if one["words"] == words]
        most = max(own, key=lambda one: sum(one["measured"].values()))
        rows.append({"ranks": ranks, **most, "ratio": round(ratio(most), 4)})
    return rows


def ratio(row: dict[str, Any]) -> float:
    """The arithmetic's total over what was measured."""
    calculated, measured = (sum(row[side].values()) for side in ("calculated", "measured"))
    return float(calculated / measured)


def as_markdown(rows: list[dict[str, Any]]) -> str:
    """The table of a page, in MB."""
    head = ["ranks", "keys", "measured, MB", "by arithmetic, MB", "ratio", "activations", "gradients, gathered"]
    lines = [f"| {' | '.join(head)} |", "|--:|---|" + "--:|" * 5]
    for row in rows:
        sides = row["measured"], row["calculated"]
        totals = [f"{sum(side.values()) / 1e6:.1f}" for side in sides]
        parts = [
            " / ".join(f"{sum(side[kind] for kind in kinds) / 1e6:.1f}" for side in sides)
            for kinds in (("activations", "logits"), ("gradients", "gathered"))
        ]
        cells = [str(row["ranks"]), f"`{row['words']}`", *totals, f"{row['ratio']:.3f}", *parts]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def with_table(page: str, table: str) -> str:
    """`page` with what stands between the two markers replaced by `table`."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}"


def main() -> None:
    """Measure all rows and write them, or write the results into a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--docs", type=Path, metavar="FILE", help="rewrite the table in it; runs nothing")
    parser.add_argument("--ranks", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.ranks:
        run_rank(args.ranks)
    elif args.docs:
        args.docs.write_text(with_table(args.docs.read_text(), as_markdown(json.loads(RESULTS.read_text()))))
    else:
        rows = [row for ranks in ROWS for row in run(ranks)]
        RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
        print(as_markdown(rows))


if __name__ == "__main__":
    main()
