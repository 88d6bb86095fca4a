"""The layout never changes the run: 30 steps of a recipe on many layouts, each beside a single process.

    python benchmarks/layouts.py                               # the whole table
    python benchmarks/layouts.py --only "FSDP 2 x TP 2" "TP 4" # these rows; the results keep the others
    python benchmarks/layouts.py --docs docs/parallelism.md    # no run: the results, as a table, into a page

The 5 M Llama on the standard library's sources, every row started as anyone starts it, by torchrun. Quoted:
the largest relative difference of any step from the same recipe on one process. The tests hold the same table
with a model that trains in a second.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Metrics = Sequence[Mapping[str, float]]  # the lines of a metrics.jsonl

RESULTS = Path(__file__).parent / "results" / "layouts.json"
STEPS = 30
BEGIN, END = "<!-- layouts -->", "<!-- /layouts -->"

SIX = ("train.global_batch_size=6", "train.micro_batch_size=6")
TIED = ("model.tie_word_embeddings=true",)
SHARED = ("model.num_key_value_heads=2",)  # fewer than ranks
MIXED, ROUNDED = ("precision=mixed",), ("precision=bf16_sr",)
FOUR, FIVE = ("model.num_hidden_layers=4",), ("model.num_hidden_layers=5",)
WHOLE = ("data.document_mask=false",)
FULL = "train.activation_checkpointing=full"
INTERLEAVED, ZERO_BUBBLE = "parallel.pp_schedule=interleaved_1f1b", "parallel.pp_schedule=zero_bubble"
DP, TP = "parallel.zero=0", "parallel.tp=2"


class Layout(NamedTuple):
    """A row of the table.

    overrides: of the layout alone. recipe: what the single process that it is held against has too.
    """

    name: str
    ranks: int
    overrides: tuple[str, ...]
    recipe: tuple[str, ...] = ()

    @property
    def precision(self) -> str:
        """Which of the TOLERANCES hold."""
        first = self.recipe[:1]
        return first[0].partition("=")[2] if first in (MIXED, ROUNDED) else "fp32"


def layout(name: str, ranks: int, overrides: str, *recipe: str) -> Layout:
    """A row from its overrides as one would type them."""
    return Layout(name, ranks, tuple(overrides.split()), recipe)


# Global batches have 8 sequences unless the row says otherwise.
LAYOUTS = (
    layout("4 micro-batches", 1, "train.micro_batch_size=2"),
    layout("DP 2", 2, "parallel.zero=0"),
    layout("ZeRO-1 on 2", 2, "parallel.zero=1"),
    layout("ZeRO-2 on 2", 2, "parallel.zero=2"),
    layout("FSDP 2", 2, "parallel.zero=3"),
    layout("FSDP 4", 4, "parallel.zero=3"),
    layout("HSDP 2 x 2", 4, "parallel.dp_replicate=2"),
    layout("TP 2 without SP", 2, "parallel.tp=2 parallel.sp=false"),
    layout("TP 2", 2, "parallel.tp=2"),
    layout("TP 4", 4, "parallel.tp=4"),
    layout("DP 2 x TP 2", 4, "parallel.zero=0 parallel.tp=2"),
    layout("ZeRO-2 on 2 x TP 2", 4, "parallel.zero=2 parallel.tp=2"),
    layout("FSDP 2 x TP 2", 4, "parallel.tp=2"),
    layout("FSDP 2 x TP 2 without SP", 4, "parallel.tp=2 parallel.sp=false"),
    layout("DP 2, 4 micro-batches", 2, "parallel.zero=0 train.micro_batch_size=1"),
    layout("ZeRO-1 on 2, 4 micro-batches", 2, "parallel.zero=1 train.micro_batch_size=1"),
    layout("ZeRO-2 on 2, 4 micro-batches", 2, "parallel.zero=2 train.micro_batch_size=1"),
    layout("FSDP 2, 4 micro-batches", 2, "train.micro_batch_size=1"),
    layout("HSDP 2 x 2, 2 micro-batches", 4, "parallel.dp_replicate=2 train.micro_batch_size=1"),
    layout("FSDP 2 x TP 2, 4 micro-batches", 4, "parallel.tp=2 train.micro_batch_size=1"),
    layout("FSDP 4, 6 sequences", 4, "", *SIX),
    layout("FSDP 4, 6 sequences, 2 micro-batches", 4, "train.micro_batch_size=1", *SIX),
    layout("FSDP 2 x TP 2, no document masks", 4, "parallel.tp=2", *WHOLE),
    layout("TP 2, separate projections", 2, "parallel.tp=2 model.coalesce=false"),
    layout("TP 4, 2 KV heads", 4, "parallel.tp=4", *SHARED),
    layout("TP 4, 2 KV heads, separate projections", 4, "parallel.tp=4 model.coalesce=false", *SHARED),
    layout("FSDP 2 x TP 2, 1 KV head", 4, "parallel.tp=2", "model.num_key_value_heads=1"),
    layout("FSDP 2 x TP 2, tied embeddings", 4, "parallel.tp=2", *TIED),
    layout("FSDP 2 x TP 2, recomputing", 4, f"parallel.tp=2 {FULL}"),
    layout("PP 2", 2, "parallel.pp=2 train.micro_batch_size=2"),
    layout("PP 2, 5 layers", 2, "parallel.pp=2 train.micro_batch_size=4", *FIVE),
    layout("PP 4", 4, "parallel.pp=4 train.micro_batch_size=1", *FOUR),
    layout("PP 2 x DP 2", 4, "parallel.pp=2 parallel.zero=0 train.micro_batch_size=1"),
    layout("PP 2 x ZeRO-1 on 2", 4, "parallel.pp=2 parallel.zero=1 train.micro_batch_size=1"),
    layout("PP 2 x ZeRO-2 on 2", 4, "parallel.pp=2 parallel.zero=2 train.micro_batch_size=1"),
    layout("PP 2 x FSDP 2", 4, "parallel.pp=2 train.micro_batch_size=1"),
    layout("PP 2 x FSDP 2, 6 sequences", 4, "parallel.pp=2 train.micro_batch_size=2", *SIX),
    layout("PP 2 x FSDP 2, recomputing", 4, f"parallel.pp=2 train.micro_batch_size=1 {FULL}"),
    layout("PP 2 x TP 2", 4, "parallel.pp=2 parallel.tp=2 train.micro_batch_size=2"),
    layout(
        "PP 2 x TP 2 without SP", 4, "parallel.pp=2 parallel.tp=2 parallel.sp=false train.micro_batch_size=2"
    ),
    layout("PP 2 x TP 2, no document masks", 4, "parallel.pp=2 parallel.tp=2 train.micro_batch_size=2", *WHOLE),
    layout("PP 2, interleaved", 2, f"parallel.pp=2 {INTERLEAVED} train.micro_batch_size=2", *FOUR),
    layout("PP 2, interleaved, 5 layers", 2, f"parallel.pp=2 {INTERLEAVED} train.micro_batch_size=4", *FIVE),
    layout("PP 2 x DP 2, interleaved", 4, f"parallel.pp=2 {INTERLEAVED} {DP} train.micro_batch_size=1", *FOUR),
    layout("PP 2 x FSDP 2, interleaved", 4, f"parallel.pp=2 {INTERLEAVED} train.micro_batch_size=1", *FOUR),
    layout("PP 2 x TP 2, interleaved", 4, f"parallel.pp=2 {INTERLEAVED} {TP} train.micro_batch_size=2", *FOUR),
    layout("PP 2, zero bubble", 2, f"parallel.pp=2 {ZERO_BUBBLE} train.micro_batch_size=2"),
    layout("PP 2 x DP 2, zero bubble", 4, f"parallel.pp=2 {ZERO_BUBBLE} {DP} train.micro_batch_size=1"),
    layout(
        "PP 2 x ZeRO-1 on 2, zero bubble, recomputing",
        4,
        f"parallel.pp=2 {ZERO_BUBBLE} parallel.zero=1 train.micro_batch_size=1 {FULL}",
    ),
    layout("PP 2 x TP 2, zero bubble", 4, f"parallel.pp=2 {ZERO_BUBBLE} {TP} train.micro_batch_size=2"),
    layout(
        "PP 2, zero bubble, 2 stages each",
        2,
        f"parallel.pp=2 {ZERO_BUBBLE} parallel.pp_stages=2 train.micro_batch_size=2",
        *FOUR,
    ),
    layout("DP 2", 2, "parallel.zero=0", *MIXED),
    layout("FSDP 2", 2, "", *MIXED),
    layout("FSDP 2, 4 micro-batches", 2, "train.micro_batch_size=1", *MIXED),
    layout("HSDP 2 x 2", 4, "parallel.dp_replicate=2", *MIXED),
    layout("TP 2 without SP", 2, "parallel.tp=2 parallel.sp=false", *MIXED),
    layout("TP 2", 2, "parallel.tp=2", *MIXED),
    layout("FSDP 2 x TP 2", 4, "parallel.tp=2", *MIXED),
    layout("FSDP 2 x TP 2, tied embeddings", 4, "parallel.tp=2", *MIXED, *TIED),
    layout("PP 2", 2, "parallel.pp=2 train.micro_batch_size=2", *MIXED),
    layout("PP 2 x FSDP 2", 4, "parallel.pp=2 train.micro_batch_size=1", *MIXED),
    layout("PP 2 x TP 2", 4, "parallel.pp=2 parallel.tp=2 train.micro_batch_size=2", *MIXED),
    layout("PP 2, interleaved", 2, f"parallel.pp=2 {INTERLEAVED} train.micro_batch_size=2", *MIXED, *FOUR),
    layout("PP 2, zero bubble", 2, f"parallel.pp=2 {ZERO_BUBBLE} train.micro_batch_size=2", *MIXED),
    layout(
        "PP 2 x ZeRO-1 on 2, zero bubble",
        4,
        f"parallel.pp=2 {ZERO_BUBBLE} parallel.zero=1 train.micro_batch_size=1",
        *MIXED,
    ),
    layout("4 micro-batches", 1, "train.micro_batch_size=2", *ROUNDED),
    layout("DP 2", 2, "parallel.zero=0", *ROUNDED),
    layout("FSDP 2", 2, "", *ROUNDED),
    layout("FSDP 2, 4 micro-batches", 2, "train.micro_batch_size=1", *ROUNDED),
    layout("TP 2", 2, "parallel.tp=2", *ROUNDED),
    layout("FSDP 2 x TP 2", 4, "parallel.tp=2", *ROUNDED),
    layout("PP 2 x FSDP 2", 4, "parallel.pp=2 train.micro_batch_size=1", *ROUNDED),
)

# By how much a layout may differ from the single process, relatively, at any step.
TOLERANCES = {
    "fp32": {
        "tokens": 0.0,
        "lr": 0.0,
        "first_loss": 1e-6,
        "loss": 1e-4,
        "val_loss": 1e-4,
        "grad_norm": 1e-3,
        "param_norm": 1e-3,
    },
    "mixed": {
        "tokens": 0.0,
        "lr": 0.0,
        "first_loss": 2e-2,
        "loss": 2e-2,
        "val_loss": 2e-2,
        "grad_norm": 2e-2,
        "param_norm": 2e-2,
    },
}
TOLERANCES["bf16_sr"] = TOLERANCES["mixed"]
TITLES = {  # the table's columns, of what is measured
    "first_loss": "first loss",
    "loss": "loss",
    "val_loss": "validation loss",
    "grad_norm": "gradient norm",
    "param_norm": "parameter norm",
}


def differences(metrics: Metrics, alone: Metrics) -> dict[str, float]:
    """The largest relative difference from `alone` of each of the TOLERANCES; `alone` may have more steps."""
    alone = alone[: len(metrics)]
    if not metrics or [line["step"] for line in metrics] != [line["step"] for line in alone]:
        raise ValueError("the runs have different steps")
    both = list(zip(metrics, alone, strict=True))
    pairs = {
        name: [(line[name], other[name]) for line, other in both if name in line and name in other]
        for name in TOLERANCES["fp32"]
        if name != "first_loss"
    }
    pairs["first_loss"] = pairs["loss"][:1]
    return {name: max(_relative(*pair) for pair in pairs[name]) for name in TOLERANCES["fp32"]}


def _relative(value: float, expected: float) -> float:
    return abs(value - expected) / abs(expected)


def beyond(found: Mapping[str, float], precision: str) -> dict[str, float]:
    """Of the differences, those that a layout must not make; a number that isn't one is beyond too."""
    return {name: found[name] for name, most in TOLERANCES[precision].items() if not found[name] <= most}


def recipe_words(folder: str) -> list[str]:
    """The benchmark's recipe: four KV heads can be cut over four ranks, and ties are a row's own.

    The warm-up is gentle: where the gradient norm leaps up, a step magnifies the rounding of those before.
    """
    return [
        "model=llama_5m",
        "model.num_key_value_heads=4",
        "model.tie_word_embeddings=false",
        f"train.steps={STEPS}",
        "train.seq_len=64",
        "train.validate_every=15",
        "train.validate_sequences=16",
        "optim.lr=1e-3",
        "optim.warmup_steps=20",
        "checkpoint.every=null",
        "monitor.every=10",
        "monitor.tensorboard=false",
        "monitor.sample_prompt=null",
        "platform=cpu",
        f"run.dir={folder}",
        "run.name=run",
    ]


def train(ranks: int, overrides: Sequence[str]) -> Metrics:
    """The metrics of a run of its own processes."""
    with tempfile.TemporaryDirectory() as folder:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        words = ["-m", "trainwright", "train", *recipe_words(folder), *overrides]
        done = subprocess.run(
            [sys.executable, *(launcher if ranks > 1 else []), *words],
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        if done.returncode:
            raise RuntimeError(
                f"{done.stderr[-4000:]}\n{ranks} ranks, {' '.join(overrides)}: {done.returncode}"
            )
        return [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]


def measure(rows: Sequence[Layout]) -> list[dict[str, Any]]:
    """Each row's differences; every recipe is trained once on a single process."""
    alone: dict[tuple[str, ...], Metrics] = {}
    measured = []
    for row in rows:
        if row.recipe not in alone:
            alone[row.recipe] = train(1, row.recipe)
        found = differences(train(row.ranks, [*row.recipe, *row.overrides]), alone[row.recipe])
        measured.append(row._asdict() | {"precision": row.precision, "differences": found})
        print(f"{row.name}, {row.precision}: {beyond(found, row.precision) or 'the same'}", flush=True)
    return measured


def in_order(measured: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The newest measurement of each row of LAYOUTS that has one."""
    newest = {(row["name"], row["precision"]): row for row in measured}
    return [newest[row.name, row.precision] for row in LAYOUTS if (row.name, row.precision) in newest]


def as_markdown(results: Mapping[str, Any]) -> str:
    """The table of a page."""
    head = ["layout", "precision", "ranks", "keys", *TITLES.values()]
    lines = [f"| {' | '.join(head)} |", "|---|---|" + "--:|---|" + "--:|" * len(TITLES)]
    for row in results["rows"]:
        keys = " ".join(word for word in (*row["recipe"], *row["overrides"]) if word not in (*MIXED, *ROUNDED))
        figures = [_figure(row["differences"][name]) for name in TITLES]
        cells = [row["name"], row["precision"], str(row["ranks"]), f"`{keys}`" if keys else "", *figures]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _figure(difference: float) -> str:
    return f"{difference:.0e}" if difference else "0"


def with_table(page: str, table: str) -> str:
    """`page` with what stands between the two markers replaced by `table`."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the page has no {BEGIN} with a {END} after it")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def main() -> None:
    """Measure the table, or write the results into a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="rows to measure; the results keep the others"
    )
    parser.add_argument("--docs", type=Path, metavar="FILE", help="rewrite the table in it; runs nothing")
    args = parser.parse_args()
    if args.docs:
        table = as_markdown(json.loads(args.out.read_text()))
        args.docs.write_text(with_table(args.docs.read_text(), table))
        return
    machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    rows = [row for row in LAYOUTS if not args.only or row.name in args.only]
    measured = measure(rows)
    kept = json.loads(args.out.read_text())["rows"] if args.only and args.out.exists() else []
    results = {"machine": machine, "steps": STEPS, "rows": in_order([*kept, *measured])}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(as_markdown({"rows": measured}))
    if any(beyond(row["differences"], row["precision"]) for row in measured):
        sys.exit(1)


if __name__ == "__main__":
    main()
