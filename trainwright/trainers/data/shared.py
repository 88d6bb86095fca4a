"""The data of a run of many ranks: what is read, made and computed once, and shared.

Of peers, the tensor-parallel and pipeline ranks that train on the same sequences, only the first reads. On each
node one rank opens files first, so that the others find the indexes in data.cache_dir. All ranks must call each
of these functions, in the same order.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice

import numpy as np

from trainwright.configs.schema import Recipe
from trainwright.trainers.data.batch import Batch
from trainwright.trainers.data.horizon import horizon
from trainwright.trainers.data.peers import give, give_count, take, take_count
from trainwright.trainers.data.stream import open_stream
from trainwright.trainers.data.tokenizer import Tokenizer, load_tokenizer
from trainwright.trainers.data.validation import open_validation
from trainwright.trainers.parallel.ranks import Ranks


def load_shared_tokenizer(recipe: Recipe, ranks: Ranks) -> Tokenizer:
    """`load_tokenizer` on each node's first rank, which fills its cache; all ranks get rank 0's."""
    tokenizer: Tokenizer = ranks.share(load_tokenizer(recipe) if ranks.local_rank == 0 else None)
    return tokenizer


def shared_horizon(recipe: Recipe, tokenizer: Tokenizer, ranks: Ranks) -> int | None:
    """`horizon`, computed on rank 0."""
    steps: int | None = ranks.share(horizon(recipe, tokenizer) if ranks.first else None)
    return steps


@contextmanager
def open_shared_stream(
    recipe: Recipe, tokenizer: Tokenizer, ranks: Ranks, cursor: np.ndarray | None = None
) -> Iterator[Iterator[Batch]]:
    """`open_stream` for this rank's share of the lanes; peers must take each batch together.

    cursor: the whole cursor, (lanes, width), wherever this rank reads.
    """
    with ExitStack() as stack:
        with ranks.one_a_node_first():
            stream = None
            if ranks.reads:
                stream = stack.enter_context(
                    open_stream(recipe, tokenizer, rank=ranks.data_rank, ranks=ranks.data_ranks, cursor=cursor)
                )
        if stream is None:
            assert ranks.peers is not None
            yield take(ranks.peers)
        else:
            yield stream if ranks.peers is None else give(stream, ranks.peers)


def open_shared_validation(recipe: Recipe, tokenizer: Tokenizer, ranks: Ranks) -> list[Batch] | None:
    """`open_validation` for this rank's share of the sequences."""
    batches = None
    with ranks.one_a_node_first():
        if ranks.reads:
            batches = open_validation(recipe, tokenizer, rank=ranks.data_rank, ranks=ranks.data_ranks)
    if ranks.peers is None:
        return batches
    if ranks.reads:
        give_count(len(batches or []), ranks.peers)
        for _ in give(batches or [], ranks.peers):
            pass
    elif count := take_count(ranks.peers):
        batches = list(islice(take(ranks.peers), count))
    return batches
