"""The manifest: what a whole checkpoint holds, with the size and checksum of every file."""

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from trainwright.errors import RunFailed
from trainwright.trainers.checkpoint.place import Place
from trainwright.trainers.parallel.ranks import Ranks

MANIFEST = "manifest.json"


class Entry(NamedTuple):
    """A file as it was written."""

    bytes: int
    sha256: str


def write_manifest(folder: Place, files: Mapping[str, Entry]) -> None:
    """Say what `folder` holds, when all of it has been written; `files` are named relative to it."""
    entries = {name: entry._asdict() for name, entry in sorted(files.items())}
    (folder / MANIFEST).write_text(json.dumps({"files": entries}, indent=1) + "\n")


def fault(folder: Place, ranks: Ranks) -> str | None:
    """What is wrong with the checkpoint in `folder`, in a few words; None when it is whole.

    All ranks call it; each reads its share of the files.

    Raises:
        RunFailed: a file can't be read, on any rank: that doesn't show that it is damaged.
    """
    files = read_together(lambda: _entries(folder) if ranks.first else None, folder, ranks)[0]
    if isinstance(files, str):
        return files
    mine = list(files.items())[ranks.rank :: ranks.size]
    faults = read_together(
        lambda: [_file_fault(folder / name, name, entry) for name, entry in mine], folder, ranks
    )
    return next((wrong for share in faults for wrong in share if wrong), None)


def read_together(read: Callable[[], Any], folder: Place, ranks: Ranks) -> list[Any]:
    """What `read` gives on every rank, by rank. All ranks call it.

    Raises:
        RunFailed: on all of them, what of `folder` couldn't be read on one.
    """
    try:
        own, trouble = read(), None
    except OSError as error:
        own, trouble = None, str(error)
    shares = ranks.gather((own, trouble))
    if said := next((trouble for _, trouble in shares if trouble), None):
        raise RunFailed(
            f"the checkpoint {folder} can't be read ({said}): start again, or delete it if that stays"
        )
    return [own for own, _ in shares]


def _entries(folder: Place) -> dict[str, Entry] | str:
    """The manifest's entries, or what is wrong with it."""
    if not (folder / MANIFEST).is_file():
        return "it has no manifest"
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        return {name: Entry(entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return "its manifest can't be read"


def _file_fault(path: Place, name: str, entry: Entry) -> str | None:
    if not path.is_file():
        return f"{name} is missing"
    whole = path.size() == entry.bytes and path.sha256() == entry.sha256
    return None if whole else f"{name} is damaged"
