"""JSON lines: one object a line, its text under `text_key`; an index of lines is built once and kept."""

import json
from array import array
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
from trainwright.trainers.data.sources.text import OPEN_FILES, Buffer, bytes_of, map_file


def open_jsonl(source: SourceConfig, place: Place) -> Documents:
    """The documents of JSONL files, plain or compressed.

    Raises:
        BadRequest: no files; with on_error=refuse a line that isn't JSON or has no text under text_key.
    """
    files = list_files(source.paths, source.pattern, place.key)
    options = ("jsonl", source.text_key, source.on_error)
    if any_compressed(files, place.key):
        return open_compressed(files, lambda f, buffer: _split(f, buffer, source, place.key), place, *options)
    name = f"jsonl-{fingerprint(files, *options)}"
    index = cached_index(place.cache_dir, name, lambda: _build(files, source, place.key))
    return JsonlDocuments(files, source.text_key, index)


class JsonlDocuments:
    """Lines of mapped files, parsed when they are read."""

    def __init__(self, files: list[Path], text_key: str, index: Index) -> None:
        self.lengths, self.blocks, self.skipped = index["length"], None, int(index["skipped"][0])
        self._file, self._start, self._end = index["file"], index["start"], index["end"]
        self._files, self._text_key = files, text_key
        self._open = lru_cache(maxsize=OPEN_FILES)(map_file)

    def read(self, document: int) -> bytes:
        file, start, end = self._files[self._file[document]], self._start[document], self._end[document]
        line = bytes_of(self._open(file), file, int(start), int(end))
        return text_of(bytes(line), self._text_key)


def text_of(line: bytes, text_key: str) -> bytes:
    """A line's text as UTF-8.

    Raises:
        ValueError: what is wrong with the line, as the end of a sentence about it.
    """
    try:
        parsed = json.loads(line.decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"isn't JSON ({error})") from None
    text = parsed.get(text_key) if isinstance(parsed, dict) else None
    if not isinstance(text, str):
        keys = f"its keys: {', '.join(parsed)}" if isinstance(parsed, dict) else "it isn't an object"
        raise ValueError(f"has no text under the text_key {text_key!r} ({keys})")
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("has half of a surrogate pair in its text") from None


def _texts(
    file: Path, buffer: Buffer, source: SourceConfig, key: str
) -> Iterator[tuple[int, int, bytes | None]]:
    """Each line's start, end and text; None for one to skip. Blank lines are left out."""
    start = number = 0
    while start < len(buffer):
        end = buffer.find(b"\n", start)
        end, number = end if end >= 0 else len(buffer), number + 1
        line = buffer[start:end]
        if line.strip():
            try:
                yield start, end, text_of(line, source.text_key)
            except ValueError as error:
                if source.on_error == "refuse":
                    raise BadRequest(
                        f"{file}, line {number} {error}: mend it, correct {key}.text_key, or skip such lines: "
                        f"{key}.on_error=skip"
                    ) from None
                yield start, end, None
        start = end + 1


def _split(file: Path, buffer: bytes, source: SourceConfig, key: str) -> tuple[list[bytes], int]:
    texts = [text for _, _, text in _texts(file, buffer, source, key)]
    good = [text for text in texts if text is not None]
    return good, len(texts) - len(good)


def _build(files: list[Path], source: SourceConfig, key: str) -> Index:
    columns = {name: array("q") for name in ("start", "end", "length", "file")}
    skipped = 0
    for number, file in enumerate(files):
        for start, end, text in _texts(file, map_file(file), source, key):
            if text is None:
                skipped += 1
                continue
            for column, value in zip(columns.values(), (start, end, len(text), number), strict=True):
                column.append(value)
    index = {name: np.array(column, dtype=np.int64) for name, column in columns.items()}
    return {**index, "file": index["file"].astype(np.int32), "skipped": np.array([skipped])}
