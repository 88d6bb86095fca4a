"""Writing a checkpoint: into a folder of another name, renamed when all of it is on the disk."""

import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import save

from trainwright.trainers.checkpoint.manifest import write_manifest
from trainwright.trainers.data.dealing import whole_cursor
from trainwright.trainers.parallel.ranks import Ranks
from trainwright.trainers.progress import Progress

PREFIX = "step_"
STATE, PROGRESS, CONFIG = "state", "progress.json", "config.yaml"


def save_checkpoint(
    folder: Path, state: Mapping[str, Any], progress: Progress, config: str, ranks: Ranks, *, keep: int
) -> Path:
    """Save `state` and `progress` as ``folder/step_00000100`` and drop all but the `keep` newest.

    All ranks call it, with one folder that all of them see. state: tensors by nested names, written as DCP
    shards; config: the text of config.yaml. Of `progress` each rank has its own rows of the cursor.

    Raises:
        OSError: the disk is full or gone, for any rank; what was there before is untouched.
    """
    path = folder / f"{PREFIX}{progress.step:08d}"
    partial = path.with_suffix(".partial")
    cursor = whole_cursor(progress.cursor, ranks)
    try:
        _on_first(ranks, lambda: _make_room(partial))
        _write_shards(partial / STATE, state, alone=ranks.size == 1)
        _on_first(ranks, lambda: _complete(partial, path, replace(progress, cursor=cursor), config, keep))
    except BaseException:
        if ranks.first:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return path


def _on_first(ranks: Ranks, work: Callable[[], None]) -> None:
    """Do `work` on rank 0 while the others wait; what breaks it is raised on all."""
    wrong = None
    if ranks.first:
        try:
            work()
        except OSError as error:
            wrong = error
    wrong = ranks.share(wrong)
    if wrong is not None:
        raise wrong


def _make_room(partial: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    (partial / STATE).mkdir(parents=True)


def _write_shards(folder: Path, state: Mapping[str, Any], *, alone: bool) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # it says what we asked for
        try:
            save(dict(state), checkpoint_id=folder, no_dist=alone)
        except CheckpointException as error:
            cause = first_cause(error)
            # A disk that fills up reaches torch's zip writer as a RuntimeError.
            raise (OSError(str(cause)) if isinstance(cause, OSError | RuntimeError) else cause) from error


def first_cause(error: CheckpointException) -> BaseException:
    """What went wrong on the first of the ranks that DCP's exception, which is a BaseException, tells of."""
    return next(iter(error.failures.values()))[0]


def _complete(partial: Path, path: Path, progress: Progress, config: str, keep: int) -> None:
    """Write what is beside the shards, the manifest last, and put the folder in its place."""
    (partial / PROGRESS).write_text(json.dumps(_progress_json(progress)) + "\n")
    (partial / CONFIG).write_text(config)
    write_manifest(partial)
    _flush_to_disk(partial)
    replaced = path.with_suffix(".replaced")
    if path.exists():
        path.rename(replaced)
    partial.rename(path)
    _flush_to_disk(path.parent)
    # What is later than this step was damaged and passed over when the run resumed.
    checkpoints = list_checkpoints(path.parent)
    here = checkpoints.index(path)
    for old in (replaced, *checkpoints[: max(0, here + 1 - keep)], *checkpoints[here + 1 :]):
        shutil.rmtree(old, ignore_errors=True)


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run by step, oldest first, whether or not they are whole."""
    return sorted(path for path in folder.glob(f"{PREFIX}*") if not path.suffix)


def _progress_json(progress: Progress) -> dict[str, Any]:
    return {
        "step": progress.step,
        "tokens": progress.tokens,
        "ended": progress.ended,
        "cursor": progress.cursor.tolist(),
    }


def _flush_to_disk(folder: Path) -> None:
    """Fsync everything below `folder`: a rename must not reach the disk before what it names."""
    for path in (*folder.rglob("*"), folder):
        if path.is_file() or path.is_dir():
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
