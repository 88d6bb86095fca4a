"""How many steps a run of train.epochs has, before it has run."""

import math

from trainwright.configs.schema import Recipe
from trainwright.trainers.data.opening import open_sources
from trainwright.trainers.data.source import Source
from trainwright.trainers.data.tokenizer import Tokenizer, first_pieces

SAMPLE = 1 << 20  # bytes


def horizon(recipe: Recipe, tokenizer: Tokenizer) -> int | None:
    """The steps of train.epochs passes over the data; None where the recipe has no train.epochs.

    An estimate from the tokens per byte of the pieces that begin epoch 0, the same on every rank.
    """
    epochs, train = recipe.train.epochs, recipe.train
    if epochs is None:
        return None
    tokens = sum(source.total_bytes * tokens_per_byte(source, tokenizer) for source in open_sources(recipe))
    return max(1, math.ceil(epochs * tokens / (train.global_batch_size * train.seq_len)))


def tokens_per_byte(source: Source, tokenizer: Tokenizer) -> float:
    """Of the first pieces of a source, the tokens that begin and end them included."""
    pieces = list(first_pieces(source, SAMPLE))
    tokens = sum(len(ids) for ids in tokenizer.encode_pieces(pieces))
    return tokens / sum(len(piece.text.encode()) for piece in pieces)
