"""Every format end to end on small files, and what each has to say about bad ones."""

import gzip
import json
import os

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from tests.trainers.data.corpora import arrays, recipe, tokenizer, write_jsonl, write_text
from trainwright.errors import BadRequest
from trainwright.trainers.data.opening import open_sources
from trainwright.trainers.data.sources import blocks
from trainwright.trainers.data.stream import open_stream

DOCUMENTS = [f"number {i} é😀 the cat\nsat on the mat\n" * (i % 4) for i in range(30)]
FULL = sorted(document for document in DOCUMENTS if document)


def jsonl_bytes() -> bytes:
    return "".join(json.dumps({"text": d, "id": i}) + "\n" for i, d in enumerate(DOCUMENTS)).encode()


def saved_jsonl(folder):
    write_jsonl(folder / "in" / "a.jsonl", DOCUMENTS[:17])
    write_jsonl(folder / "in" / "b.jsonl", DOCUMENTS[17:])
    return "jsonl"


def saved_gz(folder):
    (folder / "in").mkdir()
    half = jsonl_bytes().splitlines(keepends=True)
    (folder / "in" / "a.jsonl.gz").write_bytes(gzip.compress(b"".join(half[:13])))
    (folder / "in" / "b.jsonl.gz").write_bytes(gzip.compress(b"".join(half[13:])))
    return "jsonl"


def saved_zst(folder):
    (folder / "in").mkdir()
    frames = [zstandard.compress(part) for part in (jsonl_bytes()[:500], jsonl_bytes()[500:])]
    (folder / "in" / "a.jsonl.zst").write_bytes(b"".join(frames))
    return "jsonl"


def saved_text_gz(folder):
    (folder / "in").mkdir()
    for i, document in enumerate(DOCUMENTS):
        (folder / "in" / f"{i:02}.txt.gz").write_bytes(gzip.compress(document.encode()))
    return "text"


def saved_arrow(folder):
    dataset = datasets.Dataset.from_dict({"text": DOCUMENTS, "id": list(range(30))})
    dataset.save_to_disk(folder / "in", num_shards=3)
    return "arrow"


def saved_arrow_splits(folder):
    train = datasets.Dataset.from_dict({"text": DOCUMENTS})
    other = datasets.Dataset.from_dict({"text": ["not this one"]})
    datasets.DatasetDict({"test": other, "train": train}).save_to_disk(folder / "in")
    return "arrow"


def saved_arrow_files(folder):
    (folder / "in").mkdir()
    table = pa.table({"text": pa.array(DOCUMENTS, pa.large_string())})
    with pa.ipc.new_file(folder / "in" / "a.arrow", table.schema) as writer:
        writer.write_table(table[:11])
    with pa.ipc.new_stream(folder / "in" / "b.arrow", table.schema) as writer:
        writer.write_table(table[11:], max_chunksize=4)
    return "arrow"


def saved_parquet(folder):
    (folder / "in").mkdir()
    table = pa.table({"id": list(range(30)), "text": DOCUMENTS})
    pq.write_table(table[:20], folder / "in" / "a.parquet", row_group_size=6)
    pq.write_table(table[20:], folder / "in" / "b.parquet")
    return "parquet"


def saved_hub(folder):
    write_jsonl(folder / "in" / "train.jsonl", DOCUMENTS)
    return "hub"


SAVED = [
    saved_jsonl,
    saved_gz,
    saved_zst,
    saved_text_gz,
    saved_arrow,
    saved_arrow_splits,
    saved_arrow_files,
    saved_parquet,
    saved_hub,
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))


def texts(made):
    (source,) = open_sources(made)
    assert source.documents == len(FULL)
    return [piece.text for piece in source.read(np.arange(source.pieces))]


@pytest.mark.parametrize("save", SAVED)
def test_every_format_gives_every_document_once_in_each_epoch(tmp_path, save):
    made = recipe(tmp_path, f"data.paths=[{tmp_path}/in]", data=save(tmp_path))
    first = texts(made)
    assert sorted(first) == FULL
    assert texts(made) == first  # by the index in the cache
    (source,) = open_sources(made)
    second = [piece.text for piece in source.read(np.arange(source.pieces, 2 * source.pieces))]
    assert sorted(second) == FULL
    assert second != first


@pytest.mark.parametrize("save", SAVED)
def test_every_format_streams_and_resumes(tmp_path, save):
    made = recipe(tmp_path, f"data.paths=[{tmp_path}/in]", "data.max_piece_bytes=40", data=save(tmp_path))
    with open_stream(made, tokenizer()) as stream:
        run = [next(stream) for _ in range(8)]
    with open_stream(made, tokenizer(), cursor=run[2].cursor) as stream:
        assert [arrays(next(stream)) for _ in range(5)] == [arrays(batch) for batch in run[3:]]


def test_formats_with_the_same_documents_have_the_same_order(tmp_path):
    """The order is of document numbers, so converting a corpus doesn't change a run."""
    saved_arrow(tmp_path / "arrow")
    saved_jsonl(tmp_path / "jsonl")
    made = [recipe(tmp_path, f"data.paths=[{tmp_path}/{kind}/in]", data=kind) for kind in ("arrow", "jsonl")]
    assert texts(made[0]) == texts(made[1])


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ("file", ["one\r\ntwo\n\n \n  three\nfour\n", "five"]),
        ("line", ["one", "two", " ", "  three", "four", "five"]),
        ("blank_line", ["one\r\ntwo", "  three\nfour\n", "five"]),
    ],
)
def test_what_a_document_of_text_is(tmp_path, document, expected):
    write_text(tmp_path, ["one\r\ntwo\n\n \n  three\nfour\n", "", "five"])
    (source,) = open_sources(recipe(tmp_path, f"data.document={document}"))
    got = [piece.text for piece in source.read(np.arange(source.pieces))]
    assert sorted(got) == sorted(expected)


def test_stdlib_is_the_interpreter_s_own_source(tmp_path):
    (source,) = open_sources(recipe(tmp_path, data="stdlib"))
    assert source.documents > 300
    assert source.total_bytes > 5_000_000
    assert source.skipped > 0  # files of its tests that are deliberately not UTF-8
    again = recipe(tmp_path, "seed=1", "data.on_error=refuse", data="stdlib")
    assert [p.text for p in source.read(np.arange(3))] != [
        p.text for p in open_sources(again)[0].read(np.arange(3))
    ]


def test_an_index_is_built_again_when_a_file_changes(tmp_path):
    file = write_jsonl(tmp_path / "in" / "a.jsonl", ["one", "two"])
    made = recipe(tmp_path, f"data.paths=[{file}]", data="jsonl")
    assert open_sources(made)[0].documents == 2
    write_jsonl(file, ["one", "two", "three"])
    assert open_sources(made)[0].documents == 3


def test_blocks_at_hand_are_few(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "CACHE_BYTES", 10)
    loaded = []

    def load(block):
        loaded.append(block)
        return [b"0123456789"] * 5

    documents = blocks.BlockDocuments(np.full(20, 10), np.arange(0, 20, 5), 0, load)
    for document in [0, 4, 5, 1, 19, 18, 6]:
        documents.read(document)
        assert len(documents._kept) <= 2
    assert loaded == [0, 1, 3, 1]


# Streaming


def shards(folder, count):
    for shard in range(count):
        write_jsonl(
            folder / "in" / f"train-{shard:02}.jsonl", [f"shard {shard} row {row} " * 3 for row in range(4)]
        )


def streaming(folder, *overrides):
    return recipe(folder, f"data.paths=[{folder}/in]", "data.streaming=true", *overrides, data="hub")


def test_streaming_gives_each_row_once_an_epoch_and_resumes(tmp_path):
    shards(tmp_path, 5)
    made = streaming(tmp_path)
    (source,) = open_sources(made)
    lanes = [[p.text for p in source.read(np.arange(lane, 4 * n, 4))] for lane, n in enumerate([8, 4, 4, 4])]
    assert len({text for lane in lanes for text in lane}) == 20
    with open_stream(made, tokenizer()) as stream:
        run = [next(stream) for _ in range(8)]
    with open_stream(made, tokenizer(), cursor=run[4].cursor) as stream:
        assert [arrays(next(stream)) for _ in range(3)] == [arrays(batch) for batch in run[5:]]


def test_streaming_needs_a_shard_for_each_lane(tmp_path):
    shards(tmp_path, 3)
    command = rf"trainwright data data=hub data.paths=\[{tmp_path}/in\] data.streaming=false"
    with pytest.raises(BadRequest, match=command):
        open_sources(streaming(tmp_path))


def test_streaming_has_no_epochs(tmp_path):
    shards(tmp_path, 4)
    with pytest.raises(BadRequest, match=r"train\.epochs"):
        open_sources(streaming(tmp_path, "train.epochs=1"))


# Bad input: each one sentence that names the file and the fix


def refused(made) -> str:
    with pytest.raises(BadRequest) as caught:
        open_sources(made)
    return str(caught.value)


@pytest.mark.parametrize("kind", ["text", "jsonl"])
def test_a_file_that_is_cut_while_it_is_read(tmp_path, kind):
    file = write_jsonl(tmp_path / "in" / "a", DOCUMENTS)
    (source,) = open_sources(recipe(tmp_path, f"data.paths=[{file}]", data=kind))
    positions = np.arange(source.pieces)
    source.read(positions)
    os.truncate(file, file.stat().st_size - 9)
    with pytest.raises(BadRequest, match="a has become shorter while the run reads it"):
        source.read(positions)


def test_an_empty_corpus(tmp_path):
    write_text(tmp_path, ["", ""])
    assert "holds no text" in refused(recipe(tmp_path))
    for file in (tmp_path / "text").iterdir():
        file.unlink()
    assert "data.pattern" in refused(recipe(tmp_path))


def test_a_file_that_has_gone(tmp_path):
    write_text(tmp_path, ["cat"])
    made = recipe(tmp_path)
    (tmp_path / "text" / "00000.txt").unlink()
    (tmp_path / "text").rmdir()
    assert f"{tmp_path}/text doesn't exist" in refused(made)


@pytest.mark.parametrize("at", [0, 100, (1 << 24) - 1])
def test_text_that_is_not_utf8(tmp_path, at):
    root = write_text(tmp_path, ["cat"])
    (root / "bad.txt").write_bytes(b"x" * at + b"\xc3")
    (root / "worse.txt").write_bytes(b"x" * at + b"\xc3\x28 and more")
    said = refused(recipe(tmp_path))
    assert f"{root}/bad.txt isn't UTF-8 (byte {at})" in said
    assert "data.on_error=skip" in said
    (source,) = open_sources(recipe(tmp_path, "data.on_error=skip"))
    assert (source.documents, source.skipped) == (1, 2)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"text": "cut off', "isn't JSON"),
        (b'{"text": "\xff"}', "isn't JSON"),
        (b'{"body": "text", "id": 1}', "its keys: body, id"),
        (b'{"text": 7}', "has no text under the text_key 'text'"),
        (b'["text"]', "isn't an object"),
        (b'{"text": "\\ud800"}', "surrogate"),
    ],
)
def test_broken_lines(tmp_path, line, said, compressed):
    good = b'{"text": "good"}\n'
    file = tmp_path / ("a.jsonl.gz" if compressed else "a.jsonl")
    whole = good + b"\n" + line + b"\n" + good
    file.write_bytes(gzip.compress(whole) if compressed else whole)
    made = recipe(tmp_path, f"data.paths=[{file}]", data="jsonl")
    sentence = refused(made)
    assert said in sentence
    assert f"{file}, line 3" in sentence
    assert "data.on_error=skip" in sentence
    (source,) = open_sources(recipe(tmp_path, f"data.paths=[{file}]", "data.on_error=skip", data="jsonl"))
    assert (source.documents, source.skipped) == (2, 1)


@pytest.mark.parametrize("save", [saved_arrow, saved_parquet, saved_hub])
def test_a_missing_column(tmp_path, save):
    made = recipe(tmp_path, f"data.paths=[{tmp_path}/in]", "data.text_key=body", data=save(tmp_path))
    said = refused(made)
    assert "no column body" in said
    assert "data.text_key" in said


def test_a_column_that_is_not_text(tmp_path):
    made = recipe(tmp_path, f"data.paths=[{tmp_path}/in]", "data.text_key=id", data=saved_parquet(tmp_path))
    assert "int64, not text" in refused(made)


def test_nulls_are_skipped(tmp_path):
    pq.write_table(pa.table({"text": ["one", None, "two"]}), tmp_path / "a.parquet")
    (source,) = open_sources(recipe(tmp_path, f"data.paths=[{tmp_path}/a.parquet]", data="parquet"))
    assert (source.documents, source.skipped) == (2, 1)


@pytest.mark.parametrize(
    ("kind", "name", "said"),
    [
        ("parquet", "a.parquet", "isn't a Parquet file"),
        ("arrow", "a.arrow", "isn't an Arrow file"),
        ("jsonl", "a.jsonl.gz", "can't be decompressed"),
        ("jsonl", "a.jsonl.zst", "can't be decompressed"),
    ],
)
def test_files_of_another_kind(tmp_path, kind, name, said):
    (tmp_path / name).write_bytes(b"this is neither fish nor fowl, but it is long enough to look at")
    sentence = refused(recipe(tmp_path, f"data.paths=[{tmp_path / name}]", data=kind))
    assert said in sentence
    assert str(tmp_path / name) in sentence


def test_a_truncated_archive(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(jsonl_bytes())[:-20])
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(jsonl_bytes())[:-20])
    for name in ("a.jsonl.gz", "a.jsonl.zst"):
        assert "can't be decompressed" in refused(
            recipe(tmp_path, f"data.paths=[{tmp_path / name}]", data="jsonl")
        )


def test_compressed_files_beside_plain_ones(tmp_path):
    saved_jsonl(tmp_path)
    (tmp_path / "in" / "c.jsonl.gz").write_bytes(gzip.compress(jsonl_bytes()))
    assert "data.mix" in refused(recipe(tmp_path, f"data.paths=[{tmp_path}/in]", data="jsonl"))


def test_a_missing_split(tmp_path):
    made = recipe(tmp_path, f"data.paths=[{tmp_path}/in]", "data.split=dev", data=saved_arrow_splits(tmp_path))
    assert "no split dev: set data.split to test or train" in refused(made)


def test_a_hub_name_that_cannot_be_had(tmp_path, monkeypatch):
    def offline(*args, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    assert "data set nobody/nothing" in refused(recipe(tmp_path, "data.paths=[nobody/nothing]", data="hub"))


def test_an_unreadable_piece_limit(tmp_path):
    write_text(tmp_path, ["cat"])
    assert "data.max_piece_bytes" in refused(recipe(tmp_path, "data.max_piece_bytes=8"))


def test_a_source_of_a_mix_is_named_in_what_is_said(tmp_path):
    (tmp_path / "a.jsonl").write_text("{")
    made = recipe(tmp_path, f"data.mix.web.paths=[{tmp_path}/a.jsonl]", "data.mix.web.format=jsonl", data="mix")
    assert "data.mix.web.on_error=skip" in refused(made)
