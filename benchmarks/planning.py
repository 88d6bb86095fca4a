"""What `trainwright plan` says of known runs: beside what was published, in search of a layout, on more nodes.

    python benchmarks/planning.py                           # about a minute; the plot needs matplotlib
    python benchmarks/planning.py --docs docs/planning.md   # no run: the results, as tables, into a page
    python benchmarks/planning.py --attainable              # the share of the peak that suits the first run

Published: sequences a second on trn1.32xlarge, with 1,024 of them a step, one at a time, ZeRO-1 and an fp32
optimizer: about-neuron/benchmarks/trn1/training_data_decoder.csv in github.com/aws-neuron/aws-neuron-sdk, of
SDK 2.16 (Llama 2) and 2.24 (Llama 3.1). Whether those runs recomputed activations it doesn't say.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainwright.configs.compose import load_recipe
from trainwright.configs.degrees import resolve_degrees
from trainwright.configs.planned import any_world, planned_ranks
from trainwright.configs.schema import Recipe
from trainwright.trainers.plan.layout import GIB, Layout
from trainwright.trainers.plan.scaling import scaling
from trainwright.trainers.plan.scaling_verb import as_json as scaling_records
from trainwright.trainers.plan.search import Refused, search
from trainwright.trainers.plan.search_verb import record

RESULTS = Path(__file__).parent / "results" / "planning.json"
PLOT = Path(__file__).parents[1] / "docs" / "images" / "planning.png"
HLAT = "recipe=llama2_7b cluster=trn1.32xlarge cluster.nodes=128"
# Name, the recipe's words, sequences a second as published.
PUBLISHED = [
    ("Llama 2 7B, 16 nodes", "recipe=llama2_7b cluster.nodes=16 parallel.tp=8 parallel.dp_shard=64", 93.3),
    (
        "Llama 2 13B, 32 nodes",
        "recipe=llama2_13b cluster.nodes=32 parallel.tp=8 parallel.pp=4 parallel.dp_shard=32",
        85.65,
    ),
    (
        "Llama 2 70B, 32 nodes",
        "recipe=llama2_70b cluster.nodes=32 parallel.tp=32 parallel.pp=4 parallel.dp_shard=8",
        15.34,
    ),
    (
        "Llama 3.1 8B, 32 nodes",
        "recipe=llama3_8b cluster.nodes=32 parallel.tp=32 parallel.dp_shard=32",
        47.95,
    ),
    (
        "Llama 3.1 70B, 32 nodes",
        "recipe=llama3_70b cluster.nodes=32 parallel.tp=32 parallel.pp=8 parallel.dp_shard=4",
        7.94,
    ),
]
# As those runs were.
AS_PUBLISHED = (
    "cluster=trn1.32xlarge precision=mixed parallel.zero=1 parallel.dp_replicate=1 parallel.pp_schedule=1f1b "
    "train.global_batch_size=1024 train.micro_batch_size=1"
)
SCALED = {
    "7B": "recipe=llama2_7b cluster=trn1.32xlarge",
    "7B, 2 at a time": "recipe=llama2_7b cluster=trn1.32xlarge train.micro_batch_size=2",
    "7B, 2 at a time, replicas": "recipe=llama2_7b cluster=trn1.32xlarge train.micro_batch_size=2 "
    "parallel.dp_shard=4 parallel.dp_replicate=128",
    "70B": "recipe=llama2_70b cluster=trn1.32xlarge train.recompute_keep=[attention,qkv_proj]",
}
PUBLISHED_SCALING = 64, 0.9  # more than that for a 70 B Llama, in AWS's post on 128 trn1.32xlarge


def recipe_of(words: str) -> Recipe:
    """A recipe whose layout is checked later."""
    return load_recipe(words.split(), any_world, planned=True)


def layout_of(words: str) -> Layout:
    """The recipe's own layout on its cluster."""
    recipe = recipe_of(words)
    return Layout(recipe, resolve_degrees(recipe.parallel, planned_ranks(recipe)))


def published() -> list[dict[str, Any]]:
    """Each published run, planned with and without full recomputation."""
    rows = []
    for name, words, pace in PUBLISHED:
        kept, full = (
            layout_of(f"{words} {AS_PUBLISHED} train.activation_checkpointing={mode}")
            for mode in ("selective", "full")
        )
        rows.append(
            {
                "run": name,
                "layout": " x ".join(f"{axis} {n}" for axis, n in kept.degrees._asdict().items() if n > 1),
                "published": pace,
                "planned": round(sequences(kept), 2),
                "planned_full": round(sequences(full), 2),
                "mfu": round(kept.mfu, 4),
                "memory_gib": round(kept.memory[1].total / GIB, 1),
                "memory_full_gib": round(full.memory[1].total / GIB, 1),
                "time": {part: round(took, 3) for part, took in kept.time._asdict().items()},
            }
        )
    return rows


def sequences(layout: Layout) -> float:
    """A second."""
    return layout.tokens_per_s / layout.recipe.train.seq_len


def searched() -> dict[str, Any]:
    """The layouts for the HLAT run: the fastest and its own."""
    recipe = recipe_of(HLAT)
    started = time.perf_counter()
    found = search(recipe, planned_ranks(recipe))
    seconds = time.perf_counter() - started
    assert not isinstance(found.own, Refused)
    shown = [*enumerate(found.fit[:8]), found.own]
    return {
        "seconds": round(seconds, 1),
        "fit": len(found.fit),
        "refused": len(found.refused),
        "layouts": [record(*one) for one in shown],
        "reasons": [{"count": count, "example": example} for _, count, example in found.reasons],
    }


def attainable(words: str, pace: float) -> float:
    """The share of the peak with which a run comes out at the published pace; by halving."""
    low, high = 0.05, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        planned = sequences(layout_of(f"{words} {AS_PUBLISHED} cluster.attainable={middle}"))
        low, high = (middle, high) if planned < pace else (low, middle)
    return low


def tables(results: dict[str, Any]) -> dict[str, str]:
    """Those of the page, by the name of their markers."""
    head = ["run", "layout", "published, seq/s", "planned", "ratio", "with full recomputation", "MFU"]
    rows = [
        [
            row["run"],
            row["layout"],
            f"{row['published']:g}",
            f"{row['planned']:.1f}",
            f"{row['planned'] / row['published']:.2f}",
            f"{row['planned_full']:.1f}",
            f"{100 * row['mfu']:.0f} %",
        ]
        for row in results["published"]
    ]
    found = results["search"]
    best = found["layouts"][0]["step_s"]
    layouts = [
        [
            str(one["place"]),
            *(str(one[key]) for key in ("tp", "pp", "dp_replicate", "dp_shard", "zero", "micro_batch_size")),
            one["activation_checkpointing"],
            f"{one['memory'] / GIB:.1f}",
            f"{one['step_s']:.2f}",
            f"{100 * one['mfu']:.1f} %",
            f"{100 * (one['step_s'] / best - 1):.0f} %",
        ]
        for one in found["layouts"]
    ]
    columns = [
        "",
        "tp",
        "pp",
        "replicas",
        "shards",
        "zero",
        "micro",
        "checkpointing",
        "GiB",
        "step, s",
        "MFU",
        "slower",
    ]
    reasons = [[f"{one['count']:,}", one["example"]] for one in found["reasons"]]
    nodes = sorted({one["nodes"] for own in results["scaling"].values() for one in own})
    by_nodes = []
    for count in nodes:
        cells = [f"{count:,}"]
        for own in results["scaling"].values():
            one = next((one for one in own if one["nodes"] == count), None)
            if one is None or one["efficiency"] is None:  # the degrees don't go on so few, or it doesn't fit
                cells += ["", ""]
            else:
                cells += [f"{one['step_s']:.2f}", f"{100 * one['efficiency']:.1f} %"]
        by_nodes.append(cells)
    names = [f"{name}: {what}" for name in results["scaling"] for what in ("step, s", "efficiency")]
    return {
        "published": markdown(head, rows, 2),
        "search": markdown(columns, layouts, 1),
        "reasons": markdown(["layouts", "can't be, as"], reasons, 1),
        "scaling": markdown(["nodes", *names], by_nodes, 1),
    }


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], words: int) -> str:
    """A table whose first columns are words."""
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * words}{'--:|' * (len(head) - words)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def with_tables(page: str, found: dict[str, str]) -> str:
    """`page` with what stands between each pair of markers replaced."""
    for name, table in found.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, rest = page.split(begin)
        page = f"{before}{begin}\n{table}\n{end}{rest.split(end)[1]}"
    return page


def plot(scaled: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Efficiency over nodes."""
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6.8, 3.6))
    for name, rows in scaled.items():
        fit = [one for one in rows if one["efficiency"] is not None]
        axis.plot(
            [one["nodes"] for one in fit], [100 * one["efficiency"] for one in fit], marker="o", label=name
        )
    nodes, share = PUBLISHED_SCALING
    axis.plot(
        [nodes], [100 * share], marker="^", linestyle="", color="black", label="published: 70 B, more than"
    )
    axis.set_xscale("log", base=2)
    axis.set_xticks([2**i for i in range(9)], [str(2**i) for i in range(9)])
    axis.set_ylim(60, 102)
    axis.set_xlabel("nodes of trn1.32xlarge")
    axis.set_ylabel("efficiency, %")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, loc="lower left")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main() -> None:
    """Work all out, or write the results into a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--docs", type=Path, metavar="FILE", help="rewrite the tables in it; works nothing out")
    parser.add_argument("--attainable", action="store_true")
    args = parser.parse_args()
    if args.docs:
        page = with_tables(args.docs.read_text(), tables(json.loads(RESULTS.read_text())))
        args.docs.write_text(page)
        return
    if args.attainable:
        _, words, pace = PUBLISHED[0]
        print(f"attainable={attainable(words, pace):.3f}")
        return
    scaled = {name: scaling_records(scaling(recipe_of(words))) for name, words in SCALED.items()}
    results = {"published": published(), "search": searched(), "scaling": scaled}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print("\n\n".join(tables(results).values()))
    plot(scaled, PLOT)


if __name__ == "__main__":
    main()
