"""Batches from the rank that makes them to those that work on them with it.

A batch travels in one broadcast: the bytes of its tensors, its cursor and its other fields in a row. All
batches of a run of them have the same shape, which goes ahead of the first.
"""

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from trainwright.trainers.data.batch import Batch


def give(batches: Iterable[Batch], group: ProcessGroup) -> Iterator[Batch]:
    """`batches`, each sent from the first rank of `group` to the others when it is taken."""
    for number, batch in enumerate(batches):
        if number == 0:
            _broadcast(torch.tensor([*batch.tokens.shape, *batch.cursor.shape]), group)
        _broadcast(_pack(batch), group)
        yield batch


def take(group: ProcessGroup) -> Iterator[Batch]:
    """What the first rank of `group` gives; the caller knows how many there are."""
    shape = _broadcast(torch.empty(4, dtype=torch.int64), group).tolist()
    while True:
        yield _unpack(_broadcast(torch.empty(sum(_sizes(*shape)), dtype=torch.uint8), group), *shape)


def give_count(count: int, group: ProcessGroup) -> None:
    """Tell the other ranks of `group` how many batches there are."""
    _broadcast(torch.tensor([count]), group)


def take_count(group: ProcessGroup) -> int:
    """What `give_count` tells."""
    return int(_broadcast(torch.empty(1, dtype=torch.int64), group))


def _broadcast(tensor: Tensor, group: ProcessGroup) -> Tensor:
    dist.broadcast(tensor, group=group, group_src=0)
    return tensor


def _sizes(rows: int, seq_len: int, lanes: int, width: int) -> list[int]:
    """The bytes of a packed batch's parts; those of 8 bytes a number come first, so that all are aligned."""
    positions = rows * seq_len
    return [8 * positions, 8 * positions, 8 * lanes * width, 2 * 8, 4 * positions]


def _pack(batch: Batch) -> Tensor:
    facts = torch.tensor([batch.epoch, batch.ended], dtype=torch.float64)
    parts = (batch.tokens, batch.targets, torch.from_numpy(batch.cursor), facts, batch.documents)
    return torch.cat([part.reshape(-1).view(torch.uint8) for part in parts])


def _unpack(packed: Tensor, rows: int, seq_len: int, lanes: int, width: int) -> Batch:
    tokens, targets, cursor, facts, documents = packed.split(_sizes(rows, seq_len, lanes, width))
    epoch, ended = facts.view(torch.float64).tolist()
    return Batch(
        tokens=tokens.view(torch.int64).view(rows, seq_len),
        targets=targets.view(torch.int64).view(rows, seq_len),
        documents=documents.view(torch.int32).view(rows, seq_len),
        cursor=cursor.view(torch.int64).view(lanes, width).numpy(),
        epoch=epoch,
        ended=bool(ended),
    )
