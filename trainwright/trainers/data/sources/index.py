"""Indexes that are built once, kept in data.cache_dir and memory-mapped from then on.

An index is a folder of arrays under a name that hashes the files' paths, sizes and times and the options
that it depends on, so a changed file gets a new one. It is written aside and renamed, so that it is whole
or absent however many processes build it at once.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

VERSION = 1  # raised when a builder changes what it writes

Index = Mapping[str, np.ndarray]


def fingerprint(files: Sequence[Path], *options: object) -> str:
    """A name for what `options` make of `files` as they are now."""
    stats = [(str(file.absolute()), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps([VERSION, options, stats]).encode()).hexdigest()[:24]


def cached_index(cache_dir: str, name: str, build: Callable[[], Index]) -> Index:
    """The arrays that `build` gives, from the cache where they are there."""
    folder = Path(cache_dir).expanduser() / "index" / name
    if not folder.is_dir():
        _write(folder, build())
    return {file.stem: np.load(file, mmap_mode="r") for file in folder.glob("*.npy")}


def _write(folder: Path, index: Index) -> None:
    aside = folder.with_name(f".{folder.name}-{os.getpid()}")
    aside.mkdir(parents=True)
    try:
        for name, array in index.items():
            np.save(aside / f"{name}.npy", array)
        os.rename(aside, folder)
    except OSError:
        if not folder.is_dir():  # else another process was faster and its index is the same
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
