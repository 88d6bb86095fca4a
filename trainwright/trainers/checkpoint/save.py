"""Writing a checkpoint: beside the training, the manifest last, complete or absent."""

import json
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from threading import Thread
from typing import Any, NamedTuple

from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import save

from trainwright.configs.schema import CheckpointConfig
from trainwright.trainers.checkpoint.manifest import MANIFEST, Entry, write_manifest
from trainwright.trainers.checkpoint.place import Hashed, Place, flush_folder
from trainwright.trainers.checkpoint.shards import Writer
from trainwright.trainers.checkpoint.staging import Staging
from trainwright.trainers.data.dealing import whole_cursor
from trainwright.trainers.parallel.ranks import Ranks
from trainwright.trainers.progress import Progress

PREFIX, PARTIAL, REPLACED = "step_", ".partial", ".replaced"
STATE, PROGRESS, CONFIG = "state", "progress.json", "config.yaml"


class Saved(NamedTuple):
    """A save that has ended: where, how long it was written, its bytes over all ranks, or what broke it."""

    step: int
    path: Place
    write_s: float
    bytes: int
    wrong: OSError | None = None


class Saver:
    """Saves one state at a time, in a thread; every rank of a run has one and they save together.

    folder: where all ranks find it. config: the text of config.yaml. ranks: a process group of their own, which
    the thread uses while the training uses another.
    """

    def __init__(self, folder: Place, config: str, ranks: Ranks, policy: CheckpointConfig) -> None:
        self.folder = folder
        self.config = config
        self.ranks = ranks
        self.policy = policy
        self._staging = Staging()
        self._thread: Thread | None = None
        self._ended: Saved | BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether a save is being written."""
        return self._thread is not None and self._thread.is_alive()

    def prepare(self, state: Mapping[str, Any]) -> None:
        """Make the memory that copies go to: the first save then holds the training no longer than others."""
        self._staging.copy(state)

    def begin(self, state: Mapping[str, Any], progress: Progress) -> None:
        """Copy `state` and write the copy, as ``folder/step_00000100``, while the caller goes on.

        All ranks call it, and none of them while it is `busy`. state: tensors by nested names. Of `progress`
        each rank has its own rows of the cursor, which the loop replaces and never changes.
        """
        copied = self._staging.copy(state)
        self._ended = None
        self._thread = Thread(
            target=self._run, args=(copied, replace(progress)), name="checkpoint", daemon=True
        )
        self._thread.start()

    def ended(self, *, wait: bool = False) -> Saved | None:
        """The save that has ended since it was last asked for; None where none has.

        Raises:
            whatever isn't the disk's fault.
        """
        if self._thread is None or (self.busy and not wait):
            return None
        self._thread.join()
        self._thread = None
        if isinstance(self._ended, Saved):
            return self._ended
        assert self._ended is not None
        raise self._ended

    def settle(self, seconds: float = 10.0) -> None:
        """Give a save that is being written some time to end, before the process does."""
        if self._thread is not None:
            self._thread.join(seconds)

    def _run(self, state: dict[str, Any], progress: Progress) -> None:
        started = time.perf_counter()
        path = self.folder / step_name(progress.step)
        try:
            written, wrong = self._write(state, progress, path), None
        except OSError as error:
            written, wrong = 0, error
        except BaseException as error:
            self._ended = error
            return
        self._ended = Saved(progress.step, path, time.perf_counter() - started, written, wrong)

    def _write(self, state: dict[str, Any], progress: Progress, path: Place) -> int:
        """Write all; returns the bytes over all ranks. Until the end there is no manifest at `path`.

        Raises:
            OSError: the disk is full or gone, for any rank; what was there before is untouched.
        """
        # A file system that can't rename a folder gets it under its own name: the manifest makes it count.
        partial = Place(path.fs, path.path + PARTIAL) if path.local else path
        try:
            cursor = whole_cursor(progress.cursor, self.ranks)
            _on_first(self.ranks, lambda: _make_room(partial))
            files = _write_shards(partial / STATE, state, self.ranks)
            whole = replace(progress, cursor=cursor)
            _on_first(self.ranks, lambda: self._complete(partial, path, whole, files))
        except BaseException:
            if self.ranks.first:
                _drop(partial)
            raise
        return sum(entry.bytes for entry in files.values())

    def _complete(self, partial: Place, path: Place, progress: Progress, files: dict[str, Entry]) -> None:
        """Write what is beside the shards, the manifest last, and put the folder in its place."""
        for name, text in ((PROGRESS, json.dumps(_progress_json(progress)) + "\n"), (CONFIG, self.config)):
            with (partial / name).open("wb") as file:
                hashed = Hashed(file)
                hashed.write(text.encode())
            files[name] = Entry(hashed.bytes, hashed.digest.hexdigest())
        write_manifest(partial, files)
        if path.local:
            _put_in_place(partial, path)
        for name in outdated(step_names(self.folder), path.name, self.policy):
            _drop(self.folder / name)


def step_name(step: int) -> str:
    """``step_00000100``."""
    return f"{PREFIX}{step:08d}"


def step_names(folder: Place) -> list[str]:
    """The names of a run's checkpoints, oldest first, whether or not they are whole."""
    return [name for name in folder.names() if name.startswith(PREFIX) and "." not in name]


def outdated(names: list[str], newest: str, policy: CheckpointConfig) -> list[str]:
    """Which of `names` to delete now that `newest` is whole.

    What is later than it was damaged and passed over when the run resumed.
    """
    here = names.index(newest)
    every = policy.keep_every
    old = names[: max(0, here + 1 - policy.keep)]
    kept = [name for name in old if every is not None and int(name.removeprefix(PREFIX)) % every == 0]
    return [*(name for name in old if name not in kept), *names[here + 1 :]]


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


def _make_room(folder: Place) -> None:
    if (folder / MANIFEST).is_file():  # first, so that what is left of it never counts
        folder.fs.rm_file((folder / MANIFEST).path)
    folder.remove()
    (folder / STATE).make()


def _put_in_place(partial: Place, path: Place) -> None:
    """Rename `partial`; what has its name already stays until it has."""
    flush_folder((partial / STATE).path)
    flush_folder(partial.path)
    replaced = Place(path.fs, path.path + REPLACED)
    if path.is_folder():
        replaced.remove()
        path.rename(replaced)
    partial.rename(path)
    _drop(replaced)


def _drop(folder: Place) -> None:
    """Delete `folder`; what can't be deleted does no harm."""
    try:
        folder.remove()
    except OSError as error:
        warnings.warn(f"{folder} couldn't be deleted ({error})", stacklevel=2)


def _write_shards(folder: Place, state: dict[str, Any], ranks: Ranks) -> dict[str, Entry]:
    """Write this rank's part; returns the files of all ranks, named relative to the checkpoint."""
    writer = Writer(folder)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # it says what we asked for
        try:
            save(state, storage_writer=writer, process_group=ranks.group, no_dist=ranks.size == 1)
        except CheckpointException as error:
            cause = first_cause(error)
            # A disk that fills up reaches torch's zip writer as a RuntimeError.
            raise (OSError(str(cause)) if isinstance(cause, OSError | RuntimeError) else cause) from error
    shares = ranks.gather(writer.files.written)
    return {f"{STATE}/{name}": Entry(*entry) for share in shares for name, entry in share.items()}


def first_cause(error: CheckpointException) -> BaseException:
    """What went wrong on the first of the ranks that DCP's exception, which is a BaseException, tells of."""
    return next(iter(error.failures.values()))[0]


def _progress_json(progress: Progress) -> dict[str, Any]:
    return {
        "step": progress.step,
        "tokens": progress.tokens,
        "ended": progress.ended,
        "cursor": progress.cursor.tolist(),
    }
