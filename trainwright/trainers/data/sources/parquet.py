"""Parquet files: a row group is read whole, so it is a block."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trainwright.configs.schema import SourceConfig
from trainwright.errors import BadRequest
from trainwright.trainers.data.sources.arrow import ArrowDocuments, text_column
from trainwright.trainers.data.sources.blocks import BlockDocuments
from trainwright.trainers.data.sources.documents import Place
from trainwright.trainers.data.sources.files import list_files
from trainwright.trainers.data.sources.index import Index, cached_index, fingerprint


def open_parquet(source: SourceConfig, place: Place) -> BlockDocuments:
    """The rows of Parquet files.

    Raises:
        BadRequest: no files, one that isn't Parquet, no text column.
    """
    files = list_files(source.paths, source.pattern, place.key)
    groups = [(file, group) for file in files for group in range(_opened(file).num_row_groups)]

    def column(block: int) -> pa.ChunkedArray:
        file, group = groups[block]
        opened = _opened(file)
        if source.text_key not in opened.schema_arrow.names:  # before reading every column of a wide table
            text_column(opened.schema_arrow.empty_table(), source.text_key, str(file), place.key)
        return text_column(
            opened.read_row_group(group, columns=[source.text_key]), source.text_key, str(file), place.key
        )

    def build() -> Index:
        lengths, skipped = [np.empty(0, np.int64)], 0
        for block in range(len(groups)):
            rows = ArrowDocuments([column(block)])
            lengths.append(rows.lengths)
            skipped += rows.skipped
        return {
            "length": np.concatenate(lengths),
            "first": np.cumsum([len(group) for group in lengths[:-1]], dtype=np.int64),
            "skipped": np.array([skipped]),
        }

    index = cached_index(place.cache_dir, f"parquet-{fingerprint(files, source.text_key)}", build)
    return BlockDocuments(
        index["length"], index["first"], int(index["skipped"][0]), lambda block: ArrowDocuments([column(block)])
    )


def _opened(file: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file, memory_map=True)
    except pa.ArrowInvalid as error:
        raise BadRequest(f"{file} isn't a Parquet file ({error}): replace or remove it") from None
