"""JSON lines: one object a line, in plain JSON, readable after a kill in the middle of a line."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

TAIL = 1 << 16  # bytes of a file's end that are read first


def to_line(record: Mapping[str, object]) -> str:
    """`record` as one line without its newline.

    Floats keep every digit (`float(text)` gives the same bits back). JSON has no NaN and no infinity: they
    become null, so null means "measured, and not finite", and a value that wasn't measured has no key.
    What JSON doesn't know (a path) becomes its string.
    """
    return json.dumps(_plain(record), allow_nan=False, default=str)


def read_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each whole line of `path` with its object; nothing where there is no file.

    What isn't an object is passed over: a kill leaves half a line, a power cut leaves zeros.
    """
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(record, dict):
                yield line.rstrip("\n"), record


def last_record(path: Path) -> dict[str, Any] | None:
    """The object of the last whole line, read from the file's end; None where there is none."""
    if not path.exists():
        return None
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        tail = min(size, TAIL)
        while True:
            file.seek(size - tail)
            lines = file.read(tail).decode(errors="replace").split("\n")
            for line in reversed(lines if tail == size else lines[1:]):  # where it begins may be inside a line
                with suppress(json.JSONDecodeError):
                    if isinstance(record := json.loads(line), dict):
                        return record
            if tail == size:
                return None
            tail = min(size, 16 * tail)


def end_torn_line(file: BinaryIO) -> None:
    """In a file opened for appending and reading: a line that a kill tore stays, as a line of its own."""
    if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
        file.write(b"\n")


def _plain(value: object) -> object:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
