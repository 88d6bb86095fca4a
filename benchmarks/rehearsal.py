"""Rehearsals held against arithmetic at full size, and against real steps where those can be run.

    python benchmarks/rehearsal.py                              # about six minutes on two cores
    python benchmarks/rehearsal.py --only large                 # or real; the results keep the other
    python benchmarks/rehearsal.py --docs docs/rehearsal.md     # no run: the results, as tables, into a page

`large`: whole jobs on clusters, as `trainwright plan --rehearse` does them. `real`: the 5 M Llama on CPU ranks
that torchrun starts, with the same tracker of memory: a step's highest total, of the first rank.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from trainwright.configs.compose import load_recipe
from trainwright.configs.degrees import resolve_degrees, world_size
from trainwright.configs.planned import planned_ranks, planned_worlds
from trainwright.configs.schema import Recipe
from trainwright.trainers.parallel.ranks import open_ranks
from trainwright.trainers.parallel.traffic import micro_batches
from trainwright.trainers.plan.layout import Layout
from trainwright.trainers.plan.memory import Memory, memory_of
from trainwright.trainers.plan.rehearsal import memory_of_kinds, rehearse
from trainwright.trainers.plan.rehearsal_step import Blank, watch_steps
from trainwright.trainers.plan.rehearsal_verb import agrees, rehearse_layout
from trainwright.trainers.platform.cpu import Cpu

RESULTS = Path(__file__).parent / "results" / "rehearsal.json"
MARK = "measured="
GIB, MB = 2**30, 1e6

LARGE = [
    "recipe=llama2_7b cluster=trn1.32xlarge cluster.nodes=128",
    "recipe=llama2_70b cluster=trn1.32xlarge cluster.nodes=64 parallel.dp_shard=32",
    "recipe=llama2_70b cluster=trn2.48xlarge cluster.nodes=64 parallel.dp_shard=-1",
    "recipe=llama3_8b cluster=p5 cluster.nodes=8 parallel.dp_shard=-1",
]
SHAPE = (
    "train.global_batch_size=8 train.micro_batch_size=2 data.validation.fraction=0 train.validate_every=null"
)
UNTIED = "model.tie_word_embeddings=false"
REAL = [  # ranks, words
    *((1, f"precision={mode}") for mode in ("fp32", "mixed", "bf16", "bf16_sr")),
    *((1, f"precision={mode} train.activation_checkpointing=selective") for mode in ("fp32", "mixed")),
    *((1, f"precision={mode} train.activation_checkpointing=full") for mode in ("fp32", "bf16_sr")),
    *((2, f"parallel.zero={zero}") for zero in range(4)),
    *((2, f"parallel.zero={zero} precision=mixed") for zero in (1, 3)),
    *((2, f"parallel.zero={zero} precision=bf16_sr") for zero in (1, 3)),
    (2, "parallel.zero=3 precision=mixed train.activation_checkpointing=selective"),
    (2, "parallel.tp=2"),
    (2, "parallel.tp=2 parallel.sp=false precision=mixed"),
    (2, "parallel.tp=2 precision=bf16_sr train.activation_checkpointing=full"),
    (2, f"parallel.pp=2 precision=mixed {UNTIED}"),
    (2, f"parallel.pp=2 parallel.pp_schedule=interleaved_1f1b {UNTIED}"),
    (2, f"parallel.pp=2 parallel.pp_schedule=zero_bubble precision=mixed {UNTIED}"),
    (4, "parallel.dp_replicate=2 precision=mixed train.micro_batch_size=1"),
    (4, "parallel.tp=2 parallel.zero=1 precision=bf16_sr train.micro_batch_size=1"),
    (4, f"parallel.pp=2 parallel.zero=2 precision=mixed train.micro_batch_size=1 {UNTIED}"),
]


def rehearse_large(words: str) -> list[dict[str, Any]]:
    """A row for each place of the pipeline that is rehearsed."""
    recipe = load_recipe(words.split(), planned_worlds, planned=True)
    layout = Layout(recipe, resolve_degrees(recipe.parallel, planned_ranks(recipe)))
    began = time.perf_counter()
    told = rehearse_layout(layout)
    took = time.perf_counter() - began
    each = layout.ranks // layout.degrees.pp
    return [
        {
            "words": words,
            "ranks": layout.ranks,
            "rank": one.rank,
            "seconds": one.seconds,
            "processor_seconds": one.processor_seconds,
            "seconds_of_all": took,
            "micro_batches": one.micro_batches,
            "rehearsed": one.memory._asdict(),
            "arithmetic": memory_of(recipe, layout.degrees, one.rank // each)._asdict(),
            "collectives": [[*key, *count] for key, count in one.collectives.items()],
            "same_collectives": agrees(layout, one),
        }
        for one in told
    ]


def small_recipe(words: str, ranks: int) -> Recipe:
    """The 5 M Llama's, checked for so many ranks."""
    return load_recipe([*SHAPE.split(), *words.split()], lambda _: [ranks])


def measure(words: str) -> Memory:
    """The highest total of a real step on this rank."""
    recipe = small_recipe(words, world_size())
    with open_ranks(recipe.parallel, Cpu()) as ranks:
        rows = sum(micro_batches(recipe, ranks.degrees))
        watched = watch_steps(Blank(recipe, ranks), Cpu(), [rows] * 2)
    return max(map(memory_of_kinds, watched.by_moment.values()), key=lambda memory: memory.total)


def run_rank() -> None:
    """What torchrun starts: every row of so many ranks; rank 0 says what each came to."""
    for ranks, words in REAL:
        if ranks == world_size():
            memory = measure(words)
            if os.environ.get("RANK", "0") == "0":
                print(MARK + json.dumps([words, memory._asdict()]), flush=True)


def measure_all() -> list[dict[str, Any]]:
    """A row for each of REAL."""
    rows = []
    for ranks in sorted({ranks for ranks, _ in REAL}):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run([*torchrun, __file__, "--rank"], capture_output=True, text=True, env=environment)
        if done.returncode:
            raise RuntimeError(done.stderr)
        for line in done.stdout.splitlines():
            if line.startswith(MARK):
                words, measured = json.loads(line.removeprefix(MARK))
                recipe = small_recipe(words, ranks)
                rehearsed = rehearse(recipe, ranks).memory
                arithmetic = memory_of(recipe, resolve_degrees(recipe.parallel, ranks))
                kinds = {"rehearsed": rehearsed._asdict(), "arithmetic": arithmetic._asdict()}
                rows.append({"ranks": ranks, "words": words, "measured": measured, **kinds})
                print(
                    f"{ranks} {words:70} {_total(measured) / MB:8.1f} MB {_differs(rows[-1]):7.2%}", flush=True
                )
    return rows


def _total(kinds: dict[str, int]) -> int:
    return sum(kinds.values())


def _differs(row: dict[str, Any], of: str = "rehearsed", against: str = "measured") -> float:
    return _total(row[of]) / _total(row[against]) - 1


def large_table(rows: list[dict[str, Any]]) -> str:
    """Whole jobs: a line for each rank that was rehearsed."""
    head = ["job", "ranks", "rank", *Memory._fields, "all, GiB", "by arithmetic", "seconds", "of a processor"]
    lines = [f"| {' | '.join(head)} |", "|---|" + "--:|" * (len(head) - 1)]
    for row in rows:
        sizes = [f"{row['rehearsed'][kind] / GIB:.2f}" for kind in Memory._fields]
        totals = [f"{_total(row[of]) / GIB:.2f}" for of in ("rehearsed", "arithmetic")]
        named = [f"`{row['words']}`", f"{row['ranks']:,}", str(row["rank"])]
        totals += [f"{row[key]:.0f}" for key in ("seconds", "processor_seconds")]
        lines.append(f"| {' | '.join([*named, *sizes, *totals])} |")
    return "\n".join(lines)


def collectives_table(rows: list[dict[str, Any]]) -> str:
    """What the first rank of each job sends."""
    lines = ["| job | axis | collective | calls | bytes, MB |", "|---|---|---|--:|--:|"]
    for row in rows:
        if row["rank"] == 0:
            for axis, kind, calls, sent in row["collectives"]:
                lines.append(f"| `{row['words']}` | {axis} | {kind} | {calls:,} | {sent / MB:,.2f} |")
    return "\n".join(lines)


def real_table(rows: list[dict[str, Any]]) -> str:
    """Small jobs, measured."""
    lines = ["| ranks | words | measured, MB | rehearsed | by arithmetic |", "|--:|---|--:|--:|--:|"]
    for row in rows:
        differ = [f"{_differs(row, of):+.1%}" for of in ("rehearsed", "arithmetic")]
        lines.append(
            f"| {row['ranks']} | `{row['words']}` | {_total(row['measured']) / MB:.1f} | {' | '.join(differ)} |"
        )
    return "\n".join(lines)


TABLES = {
    "large": ("large", large_table),
    "collectives": ("large", collectives_table),
    "real": ("real", real_table),
}


def with_tables(page: str, results: dict[str, Any]) -> str:
    """`page` with what stands between each pair of markers replaced by its table."""
    for name, (rows, made) in TABLES.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, rest = page.split(begin)
        page = f"{before}{begin}\n{made(results[rows])}\n{end}{rest.split(end)[1]}"
    return page


def main() -> None:
    """Rehearse, measure and write the results, or write them into a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", choices=("large", "real"), help="one part; the results keep the other")
    parser.add_argument("--docs", type=Path, metavar="FILE", help="rewrite the tables in it; runs nothing")
    args = parser.parse_args()
    if args.docs:
        args.docs.write_text(with_tables(args.docs.read_text(), json.loads(RESULTS.read_text())))
        return
    results = json.loads(RESULTS.read_text()) if args.only else {}
    results["versions"] = {"torch": torch.__version__}
    if args.only != "real":
        results["large"] = [row for words in LARGE for row in rehearse_large(words)]
        for row in results["large"]:
            against, took = _differs(row, "rehearsed", "arithmetic"), row["processor_seconds"]
            print(f"{row['words']} rank {row['rank']}: {took:.0f} s, {against:+.1%} against arithmetic")
    if args.only != "large":
        results["real"] = measure_all()
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        run_rank()
    else:
        main()
