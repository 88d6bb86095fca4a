"""Which files a source's paths name, in an order that is the same on every machine."""

import os
from glob import glob
from pathlib import Path

from trainwright.errors import BadRequest


def list_files(paths: list[str], pattern: str, key: str) -> list[Path]:
    """The files of `paths` in their order: files, folders (searched for `pattern`) and globs, each sorted.

    Raises:
        BadRequest: a path that isn't there, or no file at all.
    """
    files = [file for path in paths for file in _expand(os.path.expanduser(path), pattern, key)]
    if not files:
        raise BadRequest(f"{key}.paths={paths} holds no file that matches {key}.pattern={pattern}")
    return files


def _expand(path: str, pattern: str, key: str) -> list[Path]:
    if os.path.isdir(path):
        root = Path(path)
        found = [file for file in root.rglob(pattern) if file.is_file()]
        return sorted(found, key=Path.as_posix)  # all begin alike, so it is the order of their relative paths
    if os.path.exists(path):
        return [Path(path)]
    matches = [Path(match) for match in sorted(glob(path, recursive=True)) if os.path.isfile(match)]
    if not matches:
        raise BadRequest(f"{key}.paths: {path} doesn't exist; correct the path")
    return matches
