"""Whether checkpoints can be written: to a folder that every node sees, with room for them."""

import shutil
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import NamedTuple

from trainwright.trainers.checkpoint.place import Place
from trainwright.trainers.parallel.ranks import Ranks

# Whose errors aren't a file system's, but for OSError and ValueError: Python's own and ours.
NOT_OF_A_CLIENT = {*sys.stdlib_module_names, "trainwright"}
SIGHT = 3.0  # seconds that a file on a network's file system has to come into sight on another node


class Sight(NamedTuple):
    """What a rank has seen of the folder; None: nothing is wrong.

    unwritten: why this node's file couldn't be written and read back. unseen: why rank 0's couldn't be read.
    free: bytes on the disk, where it is a disk.
    """

    unwritten: str | None
    unseen: str | None
    free: int | None


def look(folder: Place, ranks: Ranks, *, first_on_node: bool) -> Sight:
    """Write, read and remove files in the folder, and remove folders that had to be made; all ranks call it."""
    name = ranks.share(f".health-{uuid.uuid4().hex[:12]}")
    mine = folder / f"{name}-{ranks.rank}"
    unwritten = unseen = None
    with _leaving_as_it_was(folder) if first_on_node else nullcontext():
        if ranks.first:
            unwritten = _write(mine, name, make=folder)
        failed = ranks.share(unwritten) is not None  # the others look when rank 0 has written
        if not ranks.first:
            unseen = None if failed else _unseen(folder / f"{name}-0", name)
            if first_on_node and unseen is None:
                unwritten = _write(mine, name, make=folder if failed else None)
        free = shutil.disk_usage(_there(Path(folder.path))).free if folder.local else None
        if first_on_node and not ranks.first:
            _remove(mine)
        ranks.gather(None)  # all have looked
        if ranks.first:
            _remove(mine)
    return Sight(unwritten, unseen, free)


@contextmanager
def _leaving_as_it_was(folder: Place) -> Iterator[None]:
    """Remove, at the end, the folders that weren't there, as far as they are empty and on a disk."""
    above = (Path(folder.path), *Path(folder.path).parents) if folder.local else ()
    missing = [path for path in above if not path.exists()]
    try:
        yield
    finally:
        for path in missing:
            with suppress(OSError):  # one that isn't empty is somebody's by now
                path.rmdir()


def _remove(file: Place) -> None:
    try:
        file.fs.rm_file(file.path)
    except Exception as error:
        if not of_a_file_system(error):
            raise


def _there(path: Path) -> Path:
    """The folder itself, or the nearest above it that exists."""
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _write(file: Place, text: str, make: Place | None) -> str | None:
    """Write a file and read it back, and say what is wrong. make: its folder, where that may be missing."""
    try:
        if make is not None:
            make.make()
        file.write_text(text)
        return None if _read(file) == text else "a file reads otherwise than it was written"
    except Exception as error:
        if not of_a_file_system(error):
            raise
        return _said(error)


def _unseen(file: Place, text: str) -> str | None:
    """Why rank 0's file can't be read, after some seconds of trying."""
    until = time.monotonic() + SIGHT
    while True:
        try:
            return None if _read(file) == text else "it reads otherwise than rank 0 wrote it"
        except Exception as error:
            if not of_a_file_system(error):
                raise
            said = _said(error)
        if time.monotonic() > until:
            return said
        time.sleep(0.1)


def _read(file: Place) -> str:
    file.fs.invalidate_cache()
    return file.read_text()


def _said(error: Exception) -> str:
    return " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())[:200]


def of_a_file_system(error: Exception) -> bool:
    """Whether a file system can have raised it; the end of the run and a bug are no node's fault.

    The client libraries under fsspec (botocore, azure, google, ...) have errors that are no OSError: they are
    told by the package of their class, which is neither Python's nor ours.
    """
    package = type(error).__module__.partition(".")[0]
    return isinstance(error, OSError | ValueError) or package not in NOT_OF_A_CLIENT


def judge(
    folder: Place, sights: Sequence[Sight], nodes: Mapping[str, Sequence[int]], disk_gib: float
) -> tuple[dict[int, str], str | None]:
    """The ranks whose node is to blame, in words that follow "rank 3", and what is wrong with the request.

    What holds on every node isn't a node's fault. sights: by rank. nodes: their ranks.
    """
    firsts = [ranks[0] for ranks in nodes.values()]
    unwritten = {rank: said for rank in firsts if (said := sights[rank].unwritten)}
    if len(unwritten) == len(firsts):
        return {}, f"no node can write to {folder} ({unwritten[0]}): change checkpoint.dir or run.dir"
    wrong = {
        rank: f"can't write to the checkpoints' folder {folder} ({said})" for rank, said in unwritten.items()
    }
    unseen = {rank: sight.unseen for rank, sight in enumerate(sights) if sight.unseen}
    others = [ranks for ranks in nodes.values() if 0 not in ranks]
    if others and all(any(rank in unseen for rank in ranks) for ranks in others):
        return {}, (
            f"the nodes don't share {folder}, where checkpoints go: only the node of rank 0 has what it writes "
            "there; name a folder of all nodes in checkpoint.dir or run.dir"
        )
    wrong |= {rank: f"can't read what rank 0 wrote to {folder} ({said})" for rank, said in unseen.items()}
    full = {
        rank: f"has {free / 2**30:.2f} GiB of free disk at {folder}, and health.disk_gib={disk_gib}"
        for rank in firsts
        if (free := sights[rank].free) is not None and free < disk_gib * 2**30
    }
    if len(full) == len(firsts):
        return wrong, f"every node {full[0]}: make room, or name another checkpoint.dir"
    return full | wrong, None
