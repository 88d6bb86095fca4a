"""Finding and reading a checkpoint."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load

from trainwright.errors import BadRequest, RunFailed
from trainwright.trainers.checkpoint.manifest import fault
from trainwright.trainers.checkpoint.save import PROGRESS, STATE, first_cause, list_checkpoints
from trainwright.trainers.progress import Progress


def newest_whole(folder: Path, passed_over: Callable[[Path, str], None]) -> Path | None:
    """The newest checkpoint below `folder` that is whole; `passed_over` hears of each that isn't."""
    for path in reversed(list_checkpoints(folder)):
        wrong = fault(path)
        if wrong is None:
            return path
        passed_over(path, wrong)
    return None


def require_whole(path: Path) -> Path:
    """`path` itself, if a whole checkpoint is there.

    Raises:
        BadRequest: what is wrong with it.
    """
    wrong = fault(path) if path.is_dir() else "there is no such folder"
    if wrong is not None:
        raise BadRequest(f"resume={path} can't be used, {wrong}: name a folder like checkpoints/step_00000100")
    return path


def read_progress(path: Path) -> Progress:
    """The counters of the checkpoint at `path`."""
    said = json.loads((path / PROGRESS).read_text())
    return Progress(
        step=said["step"],
        tokens=said["tokens"],
        ended=said["ended"],
        cursor=np.array(said["cursor"], dtype=np.int64),
    )


@torch.no_grad()
def read_state(path: Path, state: dict[str, Any], *, alone: bool) -> None:
    """Fill the tensors of `state` in place from the checkpoint at `path`, whatever layout it was saved under.

    alone: this process reads for itself; else all ranks of the process group read, each its own parts.

    Raises:
        RunFailed: the disk failed, for any rank.
        BadRequest: the checkpoint lacks a tensor, or has it in another shape.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # it says what we asked for
        try:
            load(state, checkpoint_id=path / STATE, no_dist=alone)
        except CheckpointException as error:
            cause = first_cause(error)
            if isinstance(cause, OSError):
                raise RunFailed(f"the checkpoint {path} can't be read ({cause}): start again") from error
            raise BadRequest(
                f"the checkpoint {path} doesn't fit the model ({type(cause).__name__}: {cause}): name another, "
                "or start afresh with resume=none"
            ) from error
