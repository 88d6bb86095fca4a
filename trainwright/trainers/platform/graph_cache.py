"""Compiled graphs that nodes share: copied to the node's own disk before a run, and new ones back after it.

No library reads through one folder to another, and thousands of ranks that all read a shared one wait for it.
So each node's first process copies. No torch.
"""

import os
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from trainwright.configs.schema import Recipe
from trainwright.errors import BadRequest

AT_ONCE = 16  # files: a network's folder is slow for each, not for all
UNFINISHED = (".tmp", ".lock")  # how names end that libraries give to files which they still write, or wait for
OURS = ".trainwright-"  # how those begin that we still write
BEGUN = (OURS, "tmp.")  # and Triton's


def own_folder() -> Path:
    """Where graphs are kept if the recipe doesn't say: on the node's disk, this user's."""
    return Path(tempfile.gettempdir()) / f"trainwright-{os.getuid()}"


def make_own_folder() -> None:
    """Make it so that nobody else writes there: what it holds is run.

    Raises:
        BadRequest: somebody else has made it.
    """
    folder = own_folder()
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise BadRequest(f"{folder} belongs to somebody else: name another folder in compile_cache.dir")
    folder.chmod(0o700)


@contextmanager
def sharing(recipe: Recipe, folders: Mapping[str, str]) -> Iterator[None]:
    """Copy what the node's folders lack from `compile_cache.shared`, and after the body what that lacks.

    folders: the node's own, by their name below the shared one. The node's other processes don't wait: they
    compile what isn't there yet.

    Raises:
        BadRequest: the shared folder can't be made or read.
    """
    shared = recipe.compile_cache.shared
    if shared is None or os.environ.get("LOCAL_RANK", "0") != "0":
        yield
        return
    pairs = [(Path(shared).expanduser().absolute() / name, Path(own)) for name, own in folders.items()]
    try:
        for there, _ in pairs:
            there.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadRequest(f"compile_cache.shared={shared} can't be used: {error.strerror}") from None
    _copy_all("read", shared, pairs)
    try:
        yield
    finally:
        _copy_all("written", shared, [(own, there) for there, own in pairs])


def _copy_all(what: str, shared: str, pairs: list[tuple[Path, Path]]) -> None:
    """Copy, and let rank 0 say so. A cache that fails costs time and no run."""
    started = time.monotonic()
    todo = [(file, to / file.relative_to(of)) for of, to in pairs for file in _files(of)]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        done = list(pool.map(_copy, todo))
    copied = done.count("copied")
    said = next((one for one in done if one not in ("copied", "there")), None)
    trouble = "" if said is None else f' trouble="{said}"'
    if os.environ.get("RANK", "0") == "0" and (copied or trouble):
        seconds = time.monotonic() - started
        print(f"compile_cache={shared} {what}={copied} seconds={seconds:.2f}{trouble}", flush=True)


def _files(folder: Path) -> Iterator[Path]:
    for path, inner, names in os.walk(folder):
        inner[:] = [name for name in inner if not name.startswith(BEGUN)]
        for name in names:
            if not name.endswith(UNFINISHED) and not name.startswith(BEGUN):
                yield Path(path) / name


def _copy(pair: tuple[Path, Path]) -> str:
    """Copy a file where there is none, whole or not at all: others read there at any moment."""
    file, to = pair
    draft = to.with_name(f"{OURS}{os.uname().nodename}-{os.getpid()}-{threading.get_ident()}")
    try:
        if to.exists():
            return "there"
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, draft)
        draft.replace(to)
    except OSError as error:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        return f"{to}: {error.strerror}"
    return "copied"
