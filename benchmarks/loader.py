"""How fast the data stream is beside the tokenizer alone and beside `datasets.map` with grouped texts.

    python benchmarks/loader.py [--out FILE] [--megabytes 8] [--repeats 5]

All three tokenize the standard library's sources with the same byte-level BPE on one thread, in turn,
`repeats` times; the medians and their ratios go into a JSON file. Tokens are counted as each one makes
them. `bare` is `encode_batch_fast` alone: its ids are not even looked at. The loader's time is that of its
batches, after its files are opened. Where other work shares the machine, tokens per second of CPU time
(`_cpu`) are steadier than those of the clock.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # read when tokenizers is first used
os.environ["RAYON_NUM_THREADS"] = "1"

import datasets
import tokenizers

from trainwright.configs.compose import load_recipe
from trainwright.configs.schema import Recipe
from trainwright.trainers.data.opening import open_sources
from trainwright.trainers.data.source import Piece
from trainwright.trainers.data.stream import open_stream
from trainwright.trainers.data.tokenizer import Tokenizer, first_pieces, load_tokenizer

AT_A_TIME = 64  # pieces in a call of encode_batch_fast


class Rate(NamedTuple):
    """Tokens per second by the clock, and of this process's CPU time."""

    clock: float
    cpu: float


def timed(run: Callable[[], int]) -> Rate:
    """How fast `run` makes the tokens that it returns the number of."""
    clock, cpu = time.perf_counter(), time.process_time()
    tokens = run()
    return Rate(tokens / (time.perf_counter() - clock), tokens / (time.process_time() - cpu))


def bare(tokenizer: Tokenizer, texts: list[str]) -> int:
    """The tokenizer alone."""
    tokens = 0
    for start in range(0, len(texts), AT_A_TIME):
        encodings = tokenizer.inner.encode_batch_fast(
            texts[start : start + AT_A_TIME], add_special_tokens=False
        )
        tokens += sum(map(len, encodings))
    return tokens


def loader(recipe: Recipe, tokenizer: Tokenizer, tokens: int) -> Rate:
    """The stream's batches from its first, about `tokens` tokens in all."""

    def run() -> int:
        seen = 0
        while seen < tokens:
            seen += next(stream).tokens.numel()
        return seen

    with open_stream(recipe, tokenizer) as stream:
        return timed(run)


def mapped(tokenizer: Tokenizer, texts: list[str], seq_len: int) -> int:
    """`datasets.map` to tokenize and again to group into sequences, as in many training scripts."""

    def tokenize(rows: dict[str, list[str]]) -> dict[str, Any]:
        encodings = tokenizer.inner.encode_batch_fast(rows["text"], add_special_tokens=False)
        return {"input_ids": [[*encoding.ids, tokenizer.eos] for encoding in encodings]}

    def group(rows: dict[str, list[list[int]]]) -> dict[str, Any]:
        joined = list(chain.from_iterable(rows["input_ids"]))
        end = len(joined) // seq_len * seq_len
        return {"input_ids": [joined[start : start + seq_len] for start in range(0, end, seq_len)]}

    with tempfile.TemporaryDirectory() as folder:
        rows = datasets.Dataset.from_dict({"text": texts})
        files = [str(Path(folder) / name) for name in ("tokens.arrow", "groups.arrow")]
        encoded = rows.map(tokenize, batched=True, remove_columns=["text"], cache_file_name=files[0])
        grouped = encoded.map(group, batched=True, cache_file_name=files[1])
        return sum(len(row) for batch in grouped.iter(256) for row in batch["input_ids"])


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/loader.json"))
    parser.add_argument("--megabytes", type=float, default=8, help="of text in each measurement")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("overrides", nargs="*", help="of the recipe, such as train.seq_len=2048")
    options = parser.parse_args()

    datasets.disable_progress_bars()
    recipe = load_recipe(["data=stdlib", *options.overrides])
    tokenizer = load_tokenizer(recipe)
    pieces = list(first_pieces(open_sources(recipe)[0], options.megabytes * 1e6))
    tokens = sum(map(len, tokenizer.encode_pieces(pieces)))
    texts = [piece.text for piece in pieces]
    ways: dict[str, Callable[[], Rate]] = {
        "bare": lambda: timed(lambda: bare(tokenizer, texts)),
        "loader": lambda: loader(recipe, tokenizer, tokens),
        "map": lambda: timed(lambda: mapped(tokenizer, texts, recipe.train.seq_len)),
    }
    rates: dict[str, list[Rate]] = {name: [] for name in ways}
    for _ in range(options.repeats):
        for name, way in ways.items():
            rates[name].append(way())
            print(f"{name:<7}{rates[name][-1].clock:>12,.0f} tokens/s", flush=True)
    result = report(rates, recipe, tokenizer, pieces, tokens)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    for name in ("loader_over_bare", "loader_over_bare_cpu", "loader_over_map"):
        print(f"{name} {result[name]:.3f}")
    print(options.out)


def report(
    rates: dict[str, list[Rate]], recipe: Recipe, tokenizer: Tokenizer, pieces: list[Piece], tokens: int
) -> dict[str, Any]:
    """What the JSON file holds. A ratio is the median of the ratios of neighbouring measurements."""

    def ratio(one: str, other: str, which: int = 0) -> float:
        pairs = zip(rates[one], rates[other], strict=True)
        return round(statistics.median(a[which] / b[which] for a, b in pairs), 4)

    return {
        "command": "python benchmarks/loader.py",
        "corpus": {"pieces": len(pieces), "tokens": tokens, "vocab_size": tokenizer.vocab_size},
        "shape": {"seq_len": recipe.train.seq_len, "lanes": recipe.train.global_batch_size},
        "threads": 1,
        "cores": os.cpu_count(),
        "versions": {"python": platform.python_version(), "tokenizers": tokenizers.__version__},
        "tokens_per_s": {
            name: round(statistics.median(r.clock for r in values)) for name, values in rates.items()
        },
        "measured": {name: [round(rate.clock) for rate in values] for name, values in rates.items()},
        "measured_cpu": {name: [round(rate.cpu) for rate in values] for name, values in rates.items()},
        "loader_over_bare": ratio("loader", "bare"),
        "loader_over_bare_cpu": ratio("loader", "bare", 1),
        "loader_over_map": ratio("loader", "map"),
    }


if __name__ == "__main__":
    main()
