"""The validation batches: the same sequences each time, whatever the batch size and the ranks."""

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from trainwright.configs.schema import Recipe
from trainwright.trainers.data.batch import IGNORE, Batch
from trainwright.trainers.data.batcher import Batcher
from trainwright.trainers.data.cursor import new_cursor
from trainwright.trainers.data.opening import open_source, open_sources
from trainwright.trainers.data.source import Source
from trainwright.trainers.data.tokenizer import Tokenizer

LANES = 16  # how many documents are read side by side; a constant, so that the recipe decides nothing here


def open_validation(
    recipe: Recipe, tokenizer: Tokenizer, *, rank: int = 0, ranks: int = 1
) -> list[Batch] | None:
    """One rank's share of the first train.validate_sequences held-out sequences; None without such data.

    All batches have train.micro_batch_size rows and all ranks equally many batches: the last ones are
    filled up with rows that have no target.

    Raises:
        BadRequest: data that can't be read, or a fraction that holds nothing out.
    """
    validation = recipe.data.validation
    if validation.paths:
        kind = "text" if recipe.data.format == "stdlib" else recipe.data.format  # the library has no paths
        files = replace(recipe.data, format=kind, paths=validation.paths, mix={}, streaming=False)
        sources = [open_source(recipe, "validation", files)]
    elif validation.fraction:
        sources = open_sources(recipe, "validation")
    else:
        return None
    rows = list(_sequences(recipe, tokenizer, sources))
    if not rows:
        return None
    size, total = recipe.train.micro_batch_size, len(rows)
    first, end = rank * total // ranks, (rank + 1) * total // ranks
    batches = math.ceil(math.ceil(total / ranks) / size)
    own = _join(rows).sequences(first, end).filled_up(batches * size, tokenizer.eos)
    return [own.sequences(start, start + size) for start in range(0, batches * size, size)]


def _sequences(recipe: Recipe, tokenizer: Tokenizer, sources: list[Source]) -> Iterator[Batch]:
    """The sequences, one to a batch, in the order of a stream of LANES lanes over one epoch."""
    lanes = min(LANES, sum(source.pieces or 0 for source in sources), recipe.train.validate_sequences)
    batcher = Batcher(
        sources,
        tokenizer,
        new_cursor(lanes, len(sources)),
        batch_size=lanes,
        seq_len=recipe.train.seq_len,
        epochs=1,
        document_mask=recipe.data.document_mask,
    )
    left = recipe.train.validate_sequences
    while not (batch := batcher.next()).ended:
        for row in range(lanes):
            one = batch.sequences(row, row + 1)
            if left and bool((one.targets != IGNORE).any()):
                left -= 1
                yield one
        if not left:
            return


def _join(rows: list[Batch]) -> Batch:
    return Batch(
        tokens=torch.cat([row.tokens for row in rows]),
        targets=torch.cat([row.targets for row in rows]),
        documents=torch.cat([row.documents for row in rows]),
        cursor=np.empty((0, 0), np.int64),
        epoch=0.0,
    )
