"""Arrow tables, memory-mapped: folders written by datasets' `save_to_disk`, and .arrow files."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trainwright.configs.schema import SourceConfig
from trainwright.errors import BadRequest
from trainwright.trainers.data.sources.documents import Place
from trainwright.trainers.data.sources.files import list_files


def open_arrow(source: SourceConfig, place: Place) -> "ArrowDocuments":
    """The rows of Arrow tables.

    Raises:
        BadRequest: no files, one that isn't Arrow, a split or a text column that isn't there.
    """
    columns: list[pa.ChunkedArray] = []
    for path in source.paths:
        root = Path(path).expanduser()
        if (root / "state.json").is_file() or (root / "dataset_dict.json").is_file():
            columns.append(_saved(root, source, place.key))
            continue
        for file in list_files([path], source.pattern, place.key):
            columns.append(text_column(_mapped(file), source.text_key, str(file), place.key))
    return ArrowDocuments(columns)


class ArrowDocuments:
    """The strings of Arrow columns, one after another; a null is skipped."""

    blocks = None

    def __init__(self, columns: list[pa.ChunkedArray]) -> None:
        self._chunks = [chunk for column in columns for chunk in column.chunks if len(chunk)]
        self._firsts = np.cumsum([0, *(len(chunk) for chunk in self._chunks)])
        lengths = [byte_lengths(chunk) for chunk in self._chunks]
        self.lengths = np.concatenate([np.empty(0, np.int64), *lengths])
        self.skipped = sum(chunk.null_count for chunk in self._chunks)

    def __getitem__(self, row: int) -> memoryview:
        return self.read(row)

    def read(self, document: int) -> memoryview:
        chunk = int(np.searchsorted(self._firsts, document, side="right")) - 1
        return memoryview(self._chunks[chunk][document - int(self._firsts[chunk])].as_buffer())


def text_column(table: pa.Table, text_key: str, name: str, key: str) -> pa.ChunkedArray:
    """The column of strings under `text_key`."""
    if text_key not in table.column_names:
        there = ", ".join(table.column_names)
        raise BadRequest(f"{name} has no column {text_key}, only {there}: set {key}.text_key to one of them")
    column = table.column(text_key)
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        raise BadRequest(f"{name}: column {text_key} is {column.type}, not text: set {key}.text_key to another")
    return column


def byte_lengths(chunk: pa.Array) -> np.ndarray:
    """(rows,) int64, the bytes of each string; 0 for a null."""
    return np.asarray(pc.fill_null(pc.binary_length(chunk), 0)).astype(np.int64)


def _mapped(file: Path) -> pa.Table:
    mapped = pa.memory_map(str(file))
    for read in (pa.ipc.open_stream, pa.ipc.open_file):
        try:
            return read(mapped).read_all()
        except pa.ArrowInvalid:
            mapped.seek(0)
    raise BadRequest(f"{file} isn't an Arrow file: name files of format arrow or correct data.format")


def _saved(root: Path, source: SourceConfig, key: str) -> pa.ChunkedArray:
    import datasets  # takes a second to import

    loaded = datasets.load_from_disk(str(root))
    if isinstance(loaded, datasets.DatasetDict):
        if source.split not in loaded:
            raise BadRequest(f"{root} has no split {source.split}: set {key}.split to {' or '.join(loaded)}")
        loaded = loaded[source.split]
    return dataset_column(loaded, source.text_key, str(root), key)


def dataset_column(dataset: Any, text_key: str, name: str, key: str) -> pa.ChunkedArray:
    """The text column of a data set of the library `datasets`."""
    if dataset._indices is not None:
        dataset = dataset.flatten_indices()
    return text_column(dataset.data.table, text_key, name, key)
