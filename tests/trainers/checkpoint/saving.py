"""Saves that have ended when the call has."""

from pathlib import Path
from typing import Any

from trainwright.configs.schema import CheckpointConfig
from trainwright.trainers.checkpoint.place import Place, place
from trainwright.trainers.checkpoint.save import Saver
from trainwright.trainers.parallel.ranks import Ranks
from trainwright.trainers.platform.cpu import Cpu
from trainwright.trainers.progress import Progress


def save_now(
    folder: Path | str,
    state: dict[str, Any],
    progress: Progress,
    ranks: Ranks | None = None,
    damaged: tuple[str, ...] = (),
    suspect_from: int | None = None,
    **policy: Any,
) -> Place:
    """The checkpoint's place; raises the OSError of one that failed."""
    saver = Saver(place(folder), "seed: 0\n", ranks or Ranks(), Cpu(), CheckpointConfig(**policy), damaged)
    saver.copy(state)
    saver.begin(progress, suspect_from)
    saved = saver.ended(wait=True)
    assert saved is not None
    if saved.wrong:
        raise saved.wrong
    return saved.path
