"""The bytes that ranks send each other in a step: by formula, and counted in a real step.

    python benchmarks/traffic.py                        # about five minutes on two cores
    python benchmarks/traffic.py --only "FSDP 2" "TP 2"         # these rows; the results keep the others
    python benchmarks/traffic.py --docs docs/parallelism.md     # no run: the results, as a table, into a page

The 34 M Llama, 4 sequences of 512 a step, started as anyone starts it, by torchrun; the second step is counted,
on the first rank. `trainwright.trainers.parallel.traffic` says what the bytes of a call are.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from trainwright.configs.compose import load_recipe
from trainwright.configs.degrees import Degrees, resolve_degrees, world_size
from trainwright.trainers.observers.base import Metrics, Observer, Progress
from trainwright.trainers.parallel.counting import CountCollectives, Counts
from trainwright.trainers.parallel.traffic import by_group, crossing, step_traffic
from trainwright.trainers.train import train

RESULTS = Path(__file__).parent / "results" / "traffic.json"
COUNTED = 2  # the step that is counted: the first also builds what later ones reuse
MARK = "counted="
BEGIN, END = "<!-- traffic -->", "<!-- /traffic -->"

FSDP, TP = "parallel.zero=3", "parallel.tp=2"
PP = "parallel.pp=2 train.micro_batch_size=1"
LAYOUTS = [  # name, ranks, the recipe's words
    ("DP 2", 2, "parallel.zero=0"),
    ("ZeRO-1 on 2", 2, "parallel.zero=1"),
    ("ZeRO-2 on 2", 2, "parallel.zero=2"),
    ("FSDP 2", 2, FSDP),
    ("FSDP 2, mixed", 2, f"{FSDP} precision=mixed"),
    ("DP 2, 2 micro-batches", 2, "parallel.zero=0 train.micro_batch_size=1"),
    ("ZeRO-1 on 2, 2 micro-batches", 2, "parallel.zero=1 train.micro_batch_size=1"),
    ("ZeRO-2 on 2, 2 micro-batches", 2, "parallel.zero=2 train.micro_batch_size=1"),
    ("FSDP 2, 2 micro-batches", 2, f"{FSDP} train.micro_batch_size=1"),
    ("TP 2", 2, TP),
    ("TP 2, mixed", 2, f"{TP} precision=mixed"),
    ("TP 2 without SP", 2, f"{TP} parallel.sp=false"),
    ("TP 2, recomputing", 2, f"{TP} train.activation_checkpointing=full"),
    ("TP 2, separate projections", 2, f"{TP} model.coalesce=false"),
    ("FSDP 4", 4, FSDP),
    ("HSDP 2 x 2", 4, f"{FSDP} parallel.dp_replicate=2"),
    ("TP 4", 4, "parallel.tp=4"),
    ("FSDP 2 x TP 2", 4, f"{FSDP} {TP}"),
    ("PP 2", 2, PP),
    ("PP 2, interleaved", 2, f"{PP} parallel.pp_schedule=interleaved_1f1b"),
    ("PP 4", 4, "parallel.pp=4 train.micro_batch_size=1"),
    ("PP 2 x DP 2", 4, f"{PP} parallel.zero=0"),
    ("PP 2 x ZeRO-1 on 2", 4, f"{PP} parallel.zero=1"),
    ("PP 2 x FSDP 2", 4, f"{PP} {FSDP}"),
    ("PP 2 x TP 2", 4, f"{PP} {TP}"),
]


def as_sent(calculated: Counts, degrees: Degrees) -> Counts:
    """By kind of operator: on a CPU data-parallel ranks gather and reduce-scatter by sends to one another."""
    counts = dict(calculated)
    calls = sent = 0
    for kind in ("all_gather", "reduce_scatter"):
        times, size = counts.pop(("dp_shard", kind), (0, 0))
        calls += times * (degrees.dp_shard - 1)
        sent += crossing(kind, degrees.dp_shard, size)
    if calls:
        counts["dp_shard", "send"] = calls, sent
    return counts


class CountStep(Observer):
    """Counts all that is sent from the end of one step to the end of the next, which is number `step`."""

    def __init__(self, degrees: Degrees, step: int = COUNTED) -> None:
        self.step = step
        self.mode = CountCollectives(degrees)

    def on_step(self, progress: Progress, metrics: Metrics) -> None:
        """See `Observer`."""
        if progress.step == self.step - 1:
            self.mode.__enter__()
        elif progress.step == self.step:
            self.mode.__exit__(None, None, None)


def count_step(words: list[str]) -> Counts:
    """Train by a recipe to the step that is counted; on every rank."""
    recipe = load_recipe(words)
    counting = CountStep(resolve_degrees(recipe.parallel, world_size()))
    train(recipe, [counting])
    return counting.mode.counts()


def words_of(layout: str, folder: str) -> list[str]:
    """The benchmark's recipe in a layout."""
    return [
        "recipe=llama_34m",
        "platform=cpu",
        "data.validation.fraction=0",
        "train.global_batch_size=4",
        "train.micro_batch_size=4",
        "train.seq_len=512",
        f"train.steps={COUNTED}",
        "checkpoint.every=null",
        "monitor.tensorboard=false",
        "monitor.sample_prompt=null",
        f"run.dir={folder}",
        *layout.split(),
    ]


def figures(words: list[str], ranks: int) -> tuple[Counts, dict[str, Any]]:
    """By formula: calls and bytes by axis and kind, and the same as a row of the results."""
    recipe = load_recipe(words)
    degrees = resolve_degrees(recipe.parallel, ranks)
    traffic = step_traffic(recipe, degrees)
    calculated = by_group(traffic, degrees)
    sizes = degrees._asdict() | {"peers": degrees.pp * degrees.tp}
    sums = [
        {
            "axis": axis,
            "kind": kind,
            "calls": calls,
            "bytes": sent,
            "crossing": crossing(kind, sizes.get(axis, ranks), sent),
        }
        for (axis, kind), (calls, sent) in calculated.items()
    ]
    return calculated, {"sums": sums, "parts": [part._asdict() for part in traffic]}


def run_rank(words: list[str]) -> None:
    """What torchrun starts: a short run, after which rank 0 says what was counted and what is calculated."""
    counted = count_step(words)
    if os.environ["RANK"] == "0":
        calculated, row = figures(words, world_size())
        expected = as_sent(calculated, resolve_degrees(load_recipe(words).parallel, world_size()))
        said = [[*key, *count] for key, count in counted.items()]
        print(MARK + json.dumps({"same": counted == expected, **row, "counted": said}), flush=True)


def measure(name: str, ranks: int, layout: str) -> dict[str, Any]:
    """A layout's figures."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    with tempfile.TemporaryDirectory() as folder:
        command = [*torchrun, __file__, "--rank", *words_of(layout, folder)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    said = [line.removeprefix(MARK) for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not said:
        raise RuntimeError(f"{done.stderr}\n{command!r} ended with {done.returncode}")
    return {"layout": name, "ranks": ranks, "words": layout, **json.loads(said[0])}


def as_markdown(rows: list[dict[str, Any]]) -> str:
    """The table of a page: what crosses the wire."""
    head = ["layout", "keys", "calls", "data parallel, MB", "tensor parallel, MB", "pipeline, MB"]
    lines = [f"| {' | '.join(head)} |", "|---|---|" + "--:|" * 4]
    for row in rows:
        calls, sent = 0, Counter[str]()
        for one in row["sums"]:
            calls += one["calls"]
            way = "pp" if one["kind"] == "send" else "tp" if one["axis"] == "tp" else "dp"
            sent[way] += one["crossing"]
        figures = [f"{sent[way] / 1e6:.1f}" if sent[way] > 1e5 else "" for way in ("dp", "tp", "pp")]
        lines.append(f"| {row['layout']} | `{row['words']}` | {calls} | {' | '.join(figures)} |")
    return "\n".join(lines)


def with_table(page: str, table: str) -> str:
    """`page` with what stands between the two markers replaced by `table`."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}"


def main() -> None:
    """Count every layout and write the table, or write the results into a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="LAYOUT", help="these rows; the results keep the others")
    parser.add_argument("--docs", type=Path, metavar="FILE", help="rewrite the table in it; runs nothing")
    args = parser.parse_args()
    if args.docs:
        table = as_markdown(json.loads(RESULTS.read_text())["rows"])
        args.docs.write_text(with_table(args.docs.read_text(), table))
        return
    rows, differ = [], False
    print(f"{'layout':30}{'axis':14}{'kind':16}{'calls':>6}{'bytes':>14}{'crossing':>14}")
    for layout in LAYOUTS:
        if args.only and layout[0] not in args.only:
            continue
        rows.append(measure(*layout))
        for one in rows[-1]["sums"]:
            print(
                f"{layout[0]:30}{one['axis']:14}{one['kind']:16}{one['calls']:6}{one['bytes']:14,}"
                f"{one['crossing']:14,}",
                flush=True,
            )
        if not rows[-1]["same"]:
            differ = True
            print(f"{layout[0]:30}counted: {rows[-1]['counted']}", flush=True)
    kept = json.loads(RESULTS.read_text())["rows"] if args.only else []
    newest = {row["layout"]: row for row in [*kept, *rows]}
    versions, rows = {"torch": torch.__version__}, [newest[name] for name, *_ in LAYOUTS if name in newest]
    RESULTS.write_text(json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n")
    if differ:
        sys.exit("the formulas say something else than was counted")
    print("counted in a real step: the same")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        run_rank(sys.argv[2:])
    else:
        main()
