"""DCP's reader and writer on a `Place`, and the checksums of what the writer wrote."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystemBase, FileSystemReader, FileSystemWriter

from trainwright.trainers.checkpoint.manifest import Entry
from trainwright.trainers.checkpoint.place import Hashed, Place, trouble_is_os_error

Name = str | os.PathLike[str]


class Files(FileSystemBase):
    """DCP's idea of a file system, for a `Place`. `written` has every file of this rank by its name."""

    def __init__(self, folder: Place) -> None:
        self.folder = folder
        self.written: dict[str, Entry] = {}

    def _at(self, path: Name) -> Place:
        return Place(self.folder.fs, os.fspath(path))

    @contextmanager
    def create_stream(self, path: Name, mode: str) -> Iterator[Any]:
        at = self._at(path)
        with at.open(mode) as file:
            if mode == "rb":
                yield file
                return
            hashed = Hashed(file)
            yield hashed
        self.written[at.name] = Entry(hashed.bytes, hashed.digest.hexdigest())

    def concat_path(self, path: Name, suffix: str) -> str:
        return (self._at(path) / suffix).path

    def rename(self, path: Name, new_path: Name) -> None:
        with trouble_is_os_error():
            self._at(path).fs.mv(os.fspath(path), os.fspath(new_path))
        self.written[self._at(new_path).name] = self.written.pop(self._at(path).name)

    def init_path(self, path: Name) -> str:
        return os.fspath(path)

    def mkdir(self, path: Name) -> None:
        self._at(path).make()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Name) -> bool:
        return True

    def exists(self, path: Name) -> bool:
        return self._at(path).is_file()

    def rm_file(self, path: Name) -> None:
        self._at(path).remove()


class Writer(FileSystemWriter):
    """Writes one file a rank into `folder`."""

    def __init__(self, folder: Place) -> None:
        super().__init__(folder.path, sync_files=False)  # a file is flushed when it is closed
        self.files = Files(folder)
        self.fs: Any = self.files
        self.path: Any = folder.path


class Reader(FileSystemReader):
    """Reads what a `Writer` wrote into `folder`."""

    def __init__(self, folder: Place) -> None:
        super().__init__(folder.path)
        self.fs: Any = Files(folder)
        self.path: Any = folder.path
