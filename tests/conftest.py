"""What every room's tests share: a tiny recipe that trains in a second."""

import os
import random
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.ranks import RankPool

# torch asks the name server for its peers' names: where none answers, it now gives up after 1 s, for good.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")

WORDS = [
    "the",
    "model",
    "reads",
    "a",
    "page",
    "and",
    "writes",
    "the",
    "next",
    "word",
    "of",
    "it",
    "again",
    "until",
    "the",
    "page",
    "is",
    "done",
]


@pytest.fixture(scope="session")
def run_on_ranks() -> Iterator[RankPool]:
    """`run_on_ranks(function, ranks, *args)`: what a module's function returns on each of so many ranks."""
    with closing(RankPool()) as pool:
        yield pool


@pytest.fixture(scope="session")
def run_on_neuron() -> Iterator[RankPool]:
    """As `run_on_ranks`, on workers whose torch may get the device `neuron`: see tests/neuron_device."""
    with closing(RankPool()) as pool:
        yield pool


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A text file of 400 paragraphs."""
    draw = random.Random(0)
    paragraphs = (" ".join(draw.choices(WORDS, k=draw.randint(3, 60))) for _ in range(400))
    path = tmp_path / "corpus.txt"
    path.write_text("\n\n".join(paragraphs) + "\n")
    return path


@pytest.fixture
def tiny(corpus: Path, tmp_path: Path) -> list[str]:
    """Overrides that make any recipe tiny, on `corpus`, with its run and caches in `tmp_path`."""
    return [
        "data=text",
        f"data.paths=[{corpus}]",
        "data.document=blank_line",
        "data.validation.fraction=0.1",
        f"data.cache_dir={tmp_path / 'cache'}",
        "data.tokenizer.vocab_size=300",
        "model.vocab_size=300",
        "model.hidden_size=32",
        "model.intermediate_size=64",
        "model.num_hidden_layers=2",
        "model.num_attention_heads=4",
        "model.num_key_value_heads=2",
        "train.seq_len=32",
        "train.steps=12",
        "train.global_batch_size=4",
        "train.micro_batch_size=2",
        "train.validate_every=6",
        "train.validate_sequences=8",
        "checkpoint.every=5",
        "monitor.sample_tokens=5",
        "monitor.tensorboard=false",
        f"run.dir={tmp_path / 'runs'}",
        "run.name=tiny",
    ]
