"""Plain UTF-8 text: files, or their lines or paragraphs, found through an index of offsets."""

import codecs
import mmap
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np

from trainwright.configs.schema import SourceConfig
from trainwright.errors import BadRequest
from trainwright.trainers.data.sources.compressed import any_compressed, open_compressed
from trainwright.trainers.data.sources.documents import Documents, Place
from trainwright.trainers.data.sources.files import list_files
from trainwright.trainers.data.sources.index import Index, cached_index, fingerprint

BLANK_LINES = re.compile(rb"\n(?:[ \t\r]*\n)+")
CHUNK = 1 << 24
OPEN_FILES = 64  # kept mapped at a time

Buffer = mmap.mmap | bytes


def open_text(source: SourceConfig, place: Place) -> Documents:
    """The documents of text files, plain or compressed.

    Raises:
        BadRequest: no files, or one that isn't UTF-8 with on_error=refuse.
    """
    files = list_files(source.paths, source.pattern, place.key)
    if not any_compressed(files, place.key):
        return index_text(files, source, place)

    def split(file: Path, buffer: bytes) -> tuple[list[memoryview], int]:
        found = _documents(file, buffer, source, place.key)
        if found is None:
            return [], 1
        spans = zip(*(column.tolist() for column in found), strict=True)
        return [memoryview(buffer)[start : start + length] for start, length in spans], 0

    return open_compressed(files, split, place, "text", source.document, source.on_error)


def index_text(files: list[Path], source: SourceConfig, place: Place) -> "TextDocuments":
    """The documents of `files`, by the index in the cache or a new one."""
    name = fingerprint(files, "text", source.document, source.on_error)
    return TextDocuments(
        files, cached_index(place.cache_dir, f"text-{name}", lambda: _build(files, source, place.key))
    )


class TextDocuments:
    """Ranges of bytes of mapped files."""

    def __init__(self, files: list[Path], index: Index) -> None:
        self.lengths, self.blocks, self.skipped = index["length"], None, int(index["skipped"][0])
        self._file, self._start, self._files = index["file"], index["start"], files
        self._open = lru_cache(maxsize=OPEN_FILES)(map_file)

    def read(self, document: int) -> memoryview:
        start, file = int(self._start[document]), self._files[self._file[document]]
        return bytes_of(self._open(file), file, start, start + int(self.lengths[document]))


def map_file(file: Path) -> Buffer:
    """A file's bytes, mapped; an empty file can't be and is b""."""
    try:
        with file.open("rb") as opened:
            opened.seek(0, 2)
            if not opened.tell():
                return b""
            return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise BadRequest(f"{file} can't be read ({error.strerror}): correct the path") from None


def bytes_of(buffer: Buffer, file: Path, start: int, end: int) -> memoryview:
    """Part of a mapped file. Of one that was cut meanwhile the last page would read as zeros, later ones kill.

    Raises:
        BadRequest: the file is shorter than that.
    """
    if (buffer.size() if isinstance(buffer, mmap.mmap) else len(buffer)) < end:
        raise BadRequest(f"{file} has become shorter while the run reads it: restore it and start again")
    return memoryview(buffer)[start:end]


def _build(files: list[Path], source: SourceConfig, key: str) -> Index:
    starts, lengths, numbers, skipped = [], [], [], 0
    for number, file in enumerate(files):
        found = _documents(file, map_file(file), source, key)
        if found is None:
            skipped += 1
            continue
        start, length = found
        starts.append(start)
        lengths.append(length)
        numbers.append(np.full(len(start), number, dtype=np.int32))
    return {
        "start": np.concatenate([np.empty(0, np.int64), *starts]),
        "length": np.concatenate([np.empty(0, np.int64), *lengths]),
        "file": np.concatenate([np.empty(0, np.int32), *numbers]),
        "skipped": np.array([skipped]),
    }


def _documents(
    file: Path, buffer: Buffer, source: SourceConfig, key: str
) -> tuple[np.ndarray, np.ndarray] | None:
    """Starts and lengths of a file's documents; None for a file to skip."""
    if (broken := first_broken_byte(buffer)) is None:
        return find_documents(buffer, source.document)
    if source.on_error == "refuse":
        raise BadRequest(
            f"{file} isn't UTF-8 (byte {broken}): convert it or skip such files: {key}.on_error=skip"
        )
    return None


def first_broken_byte(buffer: Buffer) -> int | None:
    """Where `buffer` stops being UTF-8; None where it doesn't."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    for start in range(0, len(buffer), CHUNK):
        pending = len(decoder.getstate()[0])  # bytes of a character that the last chunk cut
        try:
            decoder.decode(buffer[start : start + CHUNK], final=start + CHUNK >= len(buffer))
        except UnicodeDecodeError as error:
            return start - pending + error.start
    return None


def find_documents(buffer: Buffer, document: str) -> tuple[np.ndarray, np.ndarray]:
    """Starts and lengths in bytes of the documents in a file, those without text left out."""
    if document == "file":
        start, end = np.zeros(1, np.int64), np.array([len(buffer)], dtype=np.int64)
    elif document == "line":
        newlines = np.concatenate([np.empty(0, np.int64), *_newlines(buffer)])
        start = np.concatenate([np.zeros(1, np.int64), newlines + 1])
        end = np.concatenate([newlines, np.array([len(buffer)])])
        returns = np.frombuffer(buffer, np.uint8)[np.maximum(end - 1, 0)] == 13 if len(buffer) else False
        end -= returns & (end > start)
    else:
        breaks = [match.span() for match in BLANK_LINES.finditer(buffer)]
        spans = np.array([0, *(edge for pair in breaks for edge in pair), len(buffer)], dtype=np.int64)
        start, end = spans[::2], spans[1::2]
    keep = end > start
    return start[keep], (end - start)[keep]


def _newlines(buffer: Buffer) -> Iterator[np.ndarray]:
    for start in range(0, len(buffer), CHUNK):
        yield start + np.flatnonzero(np.frombuffer(buffer[start : start + CHUNK], np.uint8) == 10)
