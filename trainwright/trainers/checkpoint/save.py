"""Writing a checkpoint: into a folder of another name, renamed when all of it is on the disk."""

import json
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import save

from trainwright.trainers.checkpoint.manifest import write_manifest
from trainwright.trainers.progress import Progress

PREFIX = "step_"
STATE, PROGRESS, CONFIG = "state", "progress.json", "config.yaml"


def save_checkpoint(
    folder: Path, state: Mapping[str, Any], progress: Progress, config: str, *, keep: int
) -> Path:
    """Save `state` and `progress` as ``folder/step_00000100`` and drop all but the `keep` newest.

    state: tensors by nested names, written as DCP shards; config: the text of config.yaml.

    Raises:
        OSError: the disk is full or gone; what was there before is untouched.
    """
    path = folder / f"{PREFIX}{progress.step:08d}"
    partial = path.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        (partial / STATE).mkdir(parents=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # it says what we asked for
            try:
                save(dict(state), checkpoint_id=partial / STATE, no_dist=True)
            except CheckpointException as error:  # a BaseException that holds what went wrong on each rank
                raise OSError("; ".join(str(cause) for cause, _ in error.failures.values())) from error
        (partial / PROGRESS).write_text(json.dumps(_progress_json(progress)) + "\n")
        (partial / CONFIG).write_text(config)
        write_manifest(partial)
        _flush_to_disk(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    replaced = path.with_suffix(".replaced")
    if path.exists():
        path.rename(replaced)
    partial.rename(path)
    _flush_to_disk(folder)
    # What is later than this step was damaged and passed over when the run resumed.
    checkpoints = list_checkpoints(folder)
    here = checkpoints.index(path)
    for old in (replaced, *checkpoints[: max(0, here + 1 - keep)], *checkpoints[here + 1 :]):
        shutil.rmtree(old, ignore_errors=True)
    return path


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
