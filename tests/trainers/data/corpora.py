"""Recipes, corpora and streams that the data tests share."""

import json
from functools import cache
from pathlib import Path

import numpy as np

from trainwright.configs.compose import load_recipe
from trainwright.trainers.data.batch import IGNORE
from trainwright.trainers.data.batcher import Batcher
from trainwright.trainers.data.cursor import new_cursor
from trainwright.trainers.data.dealing import owned_lanes
from trainwright.trainers.data.indexed import IndexedSource
from trainwright.trainers.data.tokenizer import END, Tokenizer, _wrap, train_bpe


def recipe(folder: Path, *overrides: str, data="text"):
    """A recipe on `folder`'s files with its own cache and a tiny shape."""
    return load_recipe(
        [
            f"data={data}",
            f"data.cache_dir={folder / 'cache'}",
            "data.tokenizer.vocab_size=300",
            "data.tokenizer.train_bytes=20000",
            "train.seq_len=16",
            "train.global_batch_size=4",
            "train.micro_batch_size=2",
            *(
                []
                if data == "stdlib" or any("data.paths" in o or "mix" in o for o in overrides)
                else [f"data.paths=[{folder}/text]"]
            ),
            *overrides,
        ]
    )


def write_text(folder: Path, documents: list[str]) -> Path:
    """One file per document, so that nothing but the order of names decides their numbers."""
    root = folder / "text"
    root.mkdir(parents=True, exist_ok=True)
    for number, document in enumerate(documents):
        (root / f"{number:05}.txt").write_bytes(document.encode())
    return root


def write_jsonl(file: Path, documents: list[str], key="text") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps({key: document}) + "\n" for document in documents))
    return file


@cache
def tokenizer() -> Tokenizer:
    """A BPE with some merges, so that tokens and bytes differ in number."""
    inner = train_bpe(iter(["the cat sat on the mat with another hat\n" * 50]), 280)
    return _wrap(inner, inner.token_to_id(END), None)


class InMemory:
    """Documents in a list; blocks of the given sizes where they are given."""

    def __init__(self, documents: list[str], blocks: list[int] | None = None):
        self.documents = [document.encode() for document in documents]
        self.lengths = np.array([len(d) for d in self.documents], dtype=np.int64)
        self.blocks = None if blocks is None else np.array(blocks, dtype=np.int64)
        self.skipped = 0
        self.reads: list[int] = []

    def read(self, document: int) -> bytes:
        self.reads.append(document)
        return self.documents[document]


def source(documents, *, name="data", weight=1.0, seed=0, limit=64, keep=None, blocks=None):
    return IndexedSource(name, weight, InMemory(documents, blocks), seed=seed, limit=limit, keep=keep)


def batcher(sources, *, lanes=4, batch_size=None, cursor=None, **options):
    cursor = new_cursor(lanes, len(sources)) if cursor is None else cursor
    options.setdefault("seq_len", 16)
    return Batcher(sources, tokenizer(), cursor, batch_size=batch_size or len(cursor), **options)


def arrays(batch):
    """What of a batch must be equal."""
    return batch.tokens.tolist(), batch.targets.tolist(), batch.documents.tolist(), batch.cursor.tolist()


def own_rows(batch, step, lanes, batch_size, rank, ranks):
    """A rank's batch `step` (from a fresh start) without the blank rows at its end, which are looked at."""
    turns = max(1, lanes // batch_size)
    due = [lane for lane in owned_lanes(lanes, rank, ranks) if lane % turns == step % turns]
    own = len(due) * max(1, batch_size // lanes)
    assert (batch.tokens[own:] == tokenizer().eos).all()
    assert (batch.targets[own:] == IGNORE).all()
    assert (batch.documents[own:] == 0).all()
    return batch.sequences(0, own)


def until_ended(made: Batcher, at_most=10_000):
    batches = []
    while not (batch := made.next()).ended:
        batches.append(batch)
        assert len(batches) < at_most
    return batches


def lane_pieces(batches, lanes: int) -> list[list[list[int]]]:
    """For each lane, the tokens of its pieces, told apart by where targets are missing (document mask on)."""
    out = []
    for lane in range(lanes):
        tokens = np.concatenate([b.tokens.numpy().reshape(lanes, -1)[lane] for b in batches])
        targets = np.concatenate([b.targets.numpy().reshape(lanes, -1)[lane] for b in batches])
        pieces, start = [], 0
        for stop in np.flatnonzero(targets == IGNORE).tolist():
            pieces.append(tokens[start : stop + 1].tolist())
            start = stop + 1
        out.append(pieces)
    return out
