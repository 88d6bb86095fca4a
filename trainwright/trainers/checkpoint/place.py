"""A folder on any file system that fsspec knows: a local path, s3://bucket/run, ..."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from trainwright.errors import BadRequest, TrainwrightError

CHUNK = 1 << 22  # bytes of a file that are read at once for its checksum


@contextmanager
def trouble_is_os_error() -> Iterator[None]:
    """What a client library raises for its store (botocore's errors are none) is an OSError to all others."""
    try:
        yield
    except (OSError, TrainwrightError):
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class Place:
    """A folder or a file: `path` on `fs`, with as much of the protocol as `fs` wants.

    Every method raises OSError where the file system can't be reached or refuses.
    """

    fs: AbstractFileSystem
    path: str

    def __truediv__(self, name: str) -> "Place":
        return Place(self.fs, f"{self.path.rstrip('/')}/{name}")

    def __str__(self) -> str:
        return self.path if self.local else str(self.fs.unstrip_protocol(self.path))

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rstrip("/").rsplit("/", 1)[-1]

    @property
    def local(self) -> bool:
        """Whether it is on this machine's file system, which can rename a folder and flush a file."""
        return isinstance(self.fs, LocalFileSystem)

    def is_file(self) -> bool:
        """Whether there is a file, as the file system says it now."""
        return self._kind() == "file"

    def is_folder(self) -> bool:
        """Whether there is a folder, as the file system says it now."""
        return self._kind() == "directory"

    def _kind(self) -> str | None:
        with trouble_is_os_error():
            self.fs.invalidate_cache()
            try:  # not `isfile`, which takes a store that doesn't answer for an empty one
                return str(self.fs.info(self.path)["type"])
            except FileNotFoundError:
                return None

    def names(self) -> list[str]:
        """The folder's entries, sorted; none where there is no folder."""
        with trouble_is_os_error():
            self.fs.invalidate_cache()
            try:
                found = self.fs.ls(self.path, detail=False)
            except FileNotFoundError:
                return []
            return sorted(Place(self.fs, entry).name for entry in found)

    def size(self) -> int:
        """The file's bytes."""
        with trouble_is_os_error():
            return int(self.fs.size(self.path))

    def read_text(self) -> str:
        """The file as text."""
        with trouble_is_os_error():
            data: bytes = self.fs.cat_file(self.path)
        return data.decode()

    def sha256(self) -> str:
        """The file's checksum, in hexadecimal."""
        digest = hashlib.sha256()
        with trouble_is_os_error(), self.fs.open(self.path, "rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
        return digest.hexdigest()

    def make(self) -> None:
        """Make the folder and those above it."""
        with trouble_is_os_error():
            self.fs.makedirs(self.path, exist_ok=True)

    def remove(self) -> None:
        """Delete the file, or the folder and all that is in it, if it is there."""
        if self._kind() is not None:
            with trouble_is_os_error():
                self.fs.rm(self.path, recursive=True)

    def rename(self, to: "Place") -> None:
        """Give a local folder another name, which reaches the disk before this returns."""
        os.rename(self.path, to.path)
        flush_folder(os.path.dirname(to.path))

    @contextmanager
    def open(self, mode: str) -> Iterator[IO[bytes]]:
        """The file's bytes, to read or to write; what was written to a local disk has reached it at the end."""
        with trouble_is_os_error(), self.fs.open(self.path, mode) as file:
            yield file
            if self.local and mode != "rb":
                file.flush()
                os.fsync(file.fileno())

    def write_text(self, text: str) -> None:
        """Make the file hold `text`."""
        with self.open("wb") as file:
            file.write(text.encode())


def place(where: str | Path, key: str = "") -> Place:
    """The place that a path or a URL names; `~` is the home folder.

    Raises:
        BadRequest: fsspec doesn't know the protocol, or lacks a package for it; `key` of the recipe says it.
    """
    try:
        fs, path = url_to_fs(os.path.expanduser(where))
    except (ValueError, ImportError) as error:
        raise BadRequest(f"{key}={where} can't be used: {error}") from error
    return Place(fs, path)


class Hashed:
    """What a file gets to write, counted and hashed on its way."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.bytes = 0
        self.digest = hashlib.sha256()

    def write(self, data: Any) -> int:
        """Write all of `data`."""
        view = memoryview(data).cast("B")
        self.digest.update(view)
        self.file.write(view)
        self.bytes += len(view)
        return len(view)

    def tell(self) -> int:
        """How many bytes were written."""
        return self.bytes

    def flush(self) -> None:
        """The file is flushed when it is closed."""

    def close(self) -> None:
        """Whoever opened the file closes it."""


def flush_folder(path: str) -> None:
    """Have a local folder's entries on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
