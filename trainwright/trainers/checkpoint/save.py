"""Writing a checkpoint: beside the training, the manifest last, complete or absent."""

import json
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
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
from trainwright.trainers.platform.base import Platform
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
    the thread uses while the training uses another. damaged: names of checkpoints that don't count, to be
    deleted after the next save.
    """

    def __init__(
        self,
        folder: Place,
        config: str,
        ranks: Ranks,
        platform: Platform,
        policy: CheckpointConfig,
        damaged: Collection[str] = (),
    ) -> None:
        self.folder = folder
        self.config = config
        self.ranks = ranks
        self.policy = policy
        self.damaged = damaged
        self._staging = Staging(platform)
        self._copied: dict[str, Any] = {}
        self._thread: Thread | None = None
        self._ended: Saved | BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether a save is being written."""
        return self._thread is not None and self._thread.is_alive()

    def copy(self, state: Mapping[str, Any]) -> None:
        """Take a copy of `state`, tensors by nested names; not while it is `busy`.

        The first makes the memory for all: taken before training, it lets the first save stall no longer.
        """
        self._copied = self._staging.copy(state)

    def begin(self, progress: Progress, suspect_from: int | None = None) -> None:
        """Write the last copy as ``folder/step_00000100`` while the caller goes on.

        All ranks call it, and none of them while it is `busy`. Of `progress` each rank has its own rows of the
        cursor, which the loop replaces and never changes.

        suspect_from: the step from which on checkpoints may turn out to be of no use, so that they take no
        place of older ones.
        """
        self._ended = None
        work = self._copied, replace(progress), suspect_from
        self._thread = Thread(target=self._run, args=work, name="checkpoint", daemon=True)
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

    def _run(self, state: dict[str, Any], progress: Progress, suspect_from: int | None) -> None:
        started = time.perf_counter()
        path = self.folder / step_name(progress.step)
        try:
            written, wrong = self._write(state, progress, path, suspect_from), None
        except OSError as error:
            written, wrong = 0, error
        except BaseException as error:
            self._ended = error
            return
        self._ended = Saved(progress.step, path, time.perf_counter() - started, written, wrong)

    def _write(self, state: dict[str, Any], progress: Progress, path: Place, suspect_from: int | None) -> int:
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
            _on_first(self.ranks, lambda: _complete(partial, path, whole, self.config, files))
        except BaseException:
            if self.ranks.first:
                _drop_unless_complete(partial)
            raise
        if self.ranks.first:
            self._forget(path.name, suspect_from)
        return sum(entry.bytes for entry in files.values())

    def _forget(self, newest: str, suspect_from: int | None) -> None:
        """Delete what is no longer needed; what can't be deleted does no harm."""
        with said_as_warning(f"old checkpoints in {self.folder} couldn't be deleted"):
            whole = [n for n in step_names(self.folder) if (self.folder / n / MANIFEST).is_file()]
            counted = [name for name in whole if name not in self.damaged or name == newest]
            good = [name for name in counted if suspect_from is None or step_of(name) < suspect_from]
            suspect = counted[len(good) :]  # the newest
            kept = [*to_keep(good, self.policy), *to_keep(suspect, self.policy)]
            for name in step_names(self.folder):
                if name not in kept:
                    drop(self.folder / name)
        self.damaged = ()


def step_name(step: int) -> str:
    """``step_00000100``."""
    return f"{PREFIX}{step:08d}"


def step_of(name: str) -> int:
    """The step of a checkpoint with this name."""
    return int(name.removeprefix(PREFIX))


def step_names(folder: Place) -> list[str]:
    """The names of a run's checkpoints, oldest first, whether or not they are whole."""
    return [name for name in folder.names() if name.startswith(PREFIX) and "." not in name]


def forget_from(folder: Place, step: int, ranks: Ranks) -> None:
    """Delete the checkpoints of `step` and later ones, the newest first. All ranks call it.

    Raises:
        OSError: on all ranks, one can't be deleted.
    """
    _on_first(ranks, lambda: _remove_from(folder, step))


def _remove_from(folder: Place, step: int) -> None:
    for name in reversed(step_names(folder)):
        if step_of(name) >= step:
            (folder / name).remove()


def to_keep(names: list[str], policy: CheckpointConfig) -> list[str]:
    """Which of the whole checkpoints `names`, oldest first, to keep."""
    every = policy.keep_every
    marked = [name for name in names if every is not None and step_of(name) % every == 0]
    return [*marked, *names[-policy.keep :]]


def _on_first(ranks: Ranks, work: Callable[[], None]) -> None:
    """Do `work` on rank 0 while the others wait; what breaks it is raised on all."""
    wrong: Exception | None = None
    if ranks.first:
        try:
            work()
        except Exception as error:
            wrong = error
    wrong = ranks.share(wrong)
    if wrong is not None:
        raise wrong


def _make_room(folder: Place) -> None:
    (folder / MANIFEST).remove()  # first, so that what is left of it never counts
    folder.remove()
    (folder / STATE).make()


def _complete(partial: Place, path: Place, progress: Progress, config: str, files: dict[str, Entry]) -> None:
    """Write what is beside the shards, the manifest last, and put the folder in its place."""
    for name, text in ((PROGRESS, json.dumps(_progress_json(progress)) + "\n"), (CONFIG, config)):
        with (partial / name).open("wb") as file:
            hashed = Hashed(file)
            hashed.write(text.encode())
        files[name] = Entry(hashed.bytes, hashed.digest.hexdigest())
    write_manifest(partial, files)
    if path.local:
        _put_in_place(partial, path)


def _put_in_place(partial: Place, path: Place) -> None:
    """Rename `partial`; what has its name already stays until it has."""
    flush_folder((partial / STATE).path)
    flush_folder(partial.path)
    replaced = Place(path.fs, path.path + REPLACED)
    if path.is_folder():
        replaced.remove()
        path.rename(replaced)
    partial.rename(path)
    drop(replaced)


def _drop_unless_complete(folder: Place) -> None:
    """Delete what a failed save has left. On an object store it may have failed after it was complete."""
    with said_as_warning(f"what a failed save left in {folder} couldn't be deleted"):
        if folder.local or not (folder / MANIFEST).is_file():
            folder.remove()


def drop(folder: Place) -> None:
    """Delete `folder`; what can't be deleted does no harm."""
    with said_as_warning(f"{folder} couldn't be deleted"):
        folder.remove()


@contextmanager
def said_as_warning(what: str) -> Iterator[None]:
    """Go on where the file system refuses."""
    try:
        yield
    except OSError as error:
        warnings.warn(f"{what}: {error}", stacklevel=3)


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
