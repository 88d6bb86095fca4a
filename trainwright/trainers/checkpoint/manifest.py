"""The manifest: what a whole checkpoint holds, with the size and checksum of every file."""

import json
from collections.abc import Mapping
from typing import NamedTuple

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
    """
    files = ranks.share(_entries(folder) if ranks.first else None)
    if isinstance(files, str):
        return files
    mine = list(files.items())[ranks.rank :: ranks.size]
    found = [wrong for name, entry in mine if (wrong := _file_fault(folder / name, name, entry))]
    return next((wrong for share in ranks.gather(found) for wrong in share), None)


def _entries(folder: Place) -> dict[str, Entry] | str:
    """The manifest's entries, or what is wrong with it."""
    if not (folder / MANIFEST).is_file():
        return "it has no manifest"
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        return {name: Entry(entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "its manifest can't be read"


def _file_fault(path: Place, name: str, entry: Entry) -> str | None:
    if not path.is_file():
        return f"{name} is missing"
    try:
        whole = path.size() == entry.bytes and path.sha256() == entry.sha256
    except OSError as error:
        return f"{name} can't be read ({error})"
    return None if whole else f"{name} is damaged"
