"""Compressed files (.gz, .zst): each is one block, since there is no way into the middle of it."""

import gzip
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from trainwright.errors import BadRequest
from trainwright.trainers.data.sources.blocks import BlockDocuments, Text
from trainwright.trainers.data.sources.documents import Place
from trainwright.trainers.data.sources.index import Index, cached_index, fingerprint

Split = Callable[[Path, bytes], tuple[Sequence[Text], int]]  # a file's documents, and how many were skipped


def any_compressed(files: list[Path], key: str) -> bool:
    """Whether `files` are compressed.

    Raises:
        BadRequest: some are and some aren't, and so have no common order.
    """
    compressed = [file for file in files if file.suffix in DECOMPRESS]
    if compressed and len(compressed) < len(files):
        raise BadRequest(
            f"{key}.paths names compressed files ({compressed[0]}) beside plain ones: decompress them, or give "
            "the two kinds as two sources of data.mix"
        )
    return bool(compressed)


def open_compressed(files: list[Path], split: Split, place: Place, *options: object) -> BlockDocuments:
    """The documents that `split` finds in each file; `options` are what `split` depends on."""

    def build() -> Index:
        lengths, firsts, skipped, count = [np.empty(0, np.int64)], [], 0, 0
        for file in files:
            documents, broken = split(file, decompress(file))
            lengths.append(np.array([len(document) for document in documents], dtype=np.int64))
            firsts.append(count)
            skipped, count = skipped + broken, count + len(documents)
        return {
            "length": np.concatenate(lengths),
            "first": np.array(firsts, dtype=np.int64),
            "skipped": np.array([skipped]),
        }

    index = cached_index(place.cache_dir, f"compressed-{fingerprint(files, *options)}", build)
    return BlockDocuments(
        index["length"],
        index["first"],
        int(index["skipped"][0]),
        lambda block: split(files[block], decompress(files[block]))[0],
    )


def decompress(file: Path) -> bytes:
    """A compressed file's whole contents."""
    try:
        return DECOMPRESS[file.suffix](file)
    except (OSError, EOFError, zlib.error, RuntimeError) as error:
        raise BadRequest(f"{file} can't be decompressed ({error}): replace or remove it") from None


def _gunzip(file: Path) -> bytes:
    with gzip.open(file) as opened:
        return opened.read()


def _unzstd(file: Path) -> bytes:
    try:
        import zstandard
    except ImportError:
        raise BadRequest(f"{file} needs the package zstandard: pip install zstandard") from None
    rest, parts = file.read_bytes(), []
    while rest:  # frame by frame: the library's reader takes a cut-off frame for the end
        frame = zstandard.ZstdDecompressor().decompressobj()
        try:
            parts.append(frame.decompress(rest))
        except zstandard.ZstdError as error:
            raise RuntimeError(str(error)) from None
        if not frame.eof:
            raise EOFError("it ends in the middle of a frame")
        rest = frame.unused_data
    return b"".join(parts)


DECOMPRESS = {".gz": _gunzip, ".zst": _unzstd}
