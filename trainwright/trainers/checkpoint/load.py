"""Finding and reading a checkpoint."""

import json
import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load

from trainwright.errors import BadRequest, RunFailed
from trainwright.trainers.checkpoint.manifest import fault, read_together
from trainwright.trainers.checkpoint.place import Place
from trainwright.trainers.checkpoint.save import (
    PARTIAL,
    PROGRESS,
    REPLACED,
    STATE,
    drop,
    first_cause,
    step_names,
    step_of,
)
from trainwright.trainers.checkpoint.shards import Reader
from trainwright.trainers.parallel.ranks import Ranks
from trainwright.trainers.progress import Progress

# What DCP says of a whole checkpoint that has other tensors than were asked for.
UNFIT = re.compile(r"Missing key|[Ss]ize mismatch")


def newest_whole(
    folder: Place, ranks: Ranks, passed_over: Callable[[Place, str], None], before: float = math.inf
) -> Place | None:
    """The newest checkpoint below `folder` that is whole; `passed_over` hears of each newer one that isn't.

    All ranks call it: they share the reading. before: only checkpoints of earlier steps than that count.

    Raises:
        RunFailed: one can't be read, which doesn't show that it is damaged.
    """
    names: list[str] = read_together(lambda: _found(folder) if ranks.first else [], folder, ranks)[0]
    for name in reversed([name for name in names if step_of(name) < before]):
        wrong = fault(folder / name, ranks)
        if wrong is None:
            return folder / name
        passed_over(folder / name, wrong)
    return None


def _found(folder: Place) -> list[str]:
    """The names of the checkpoints, after tidying up what saves that were killed have left."""
    names = folder.names()
    for name in names:
        there = name.removesuffix(REPLACED)
        if name.endswith(REPLACED) and there not in names:
            (folder / name).rename(folder / there)
        elif name.endswith((PARTIAL, REPLACED)):
            drop(folder / name)
    return step_names(folder)


def require_whole(path: Place, ranks: Ranks) -> Place:
    """`path` itself, if a whole checkpoint is there.

    Raises:
        BadRequest: what is wrong with it.
    """
    there = ranks.share(path.is_folder() if ranks.first else None)
    wrong = fault(path, ranks) if there else "there is no such folder"
    if wrong is not None:
        raise BadRequest(f"resume={path} can't be used, {wrong}: name a folder like checkpoints/step_00000100")
    return path


def read_progress(path: Place) -> Progress:
    """The counters of the checkpoint at `path`."""
    said = json.loads((path / PROGRESS).read_text())
    return Progress(
        step=said["step"],
        tokens=said["tokens"],
        ended=said["ended"],
        cursor=np.array(said["cursor"], dtype=np.int64),
    )


@torch.no_grad()
def read_state(path: Place, state: dict[str, Any], *, alone: bool) -> None:
    """Fill the tensors of `state` in place from the checkpoint at `path`, whatever layout it was saved under.

    alone: this process reads for itself; else all ranks of the process group read, each its own parts.

    Raises:
        RunFailed: the disk failed, for any rank.
        BadRequest: the checkpoint lacks a tensor, or has it in another shape.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # it says what we asked for
        try:
            load(state, storage_reader=Reader(path / STATE), no_dist=alone)
        except CheckpointException as error:
            cause = first_cause(error)
            said = f"{type(cause).__name__}: {cause}"
            if not isinstance(cause, Exception):  # an interrupt
                raise cause from error
            if not UNFIT.search(said):
                raise RunFailed(f"the checkpoint {path} can't be read ({said}): start again") from error
            raise BadRequest(
                f"the checkpoint {path} doesn't fit the model ({said}): name another, or start afresh with "
                "resume=none"
            ) from error
