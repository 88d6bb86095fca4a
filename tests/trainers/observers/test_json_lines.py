import json
import math
import struct
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from trainwright.trainers.observers.json_lines import last_record, read_lines, to_line


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_float_comes_back_bit_for_bit(value):
    assert struct.pack("d", json.loads(to_line({"loss": value}))["loss"]) == struct.pack("d", value)


def test_what_is_not_finite_is_null_at_any_depth():
    record = {"loss": math.nan, "deep": {"norms": [math.inf, np.float32(-math.inf), 1.5]}}
    assert json.loads(to_line(record)) == {"loss": None, "deep": {"norms": [None, None, 1.5]}}


def test_a_path_is_its_string_and_a_numpy_number_a_number():
    assert to_line({"path": Path("a/b"), "n": np.int64(3)}) == '{"path": "a/b", "n": 3}'


def test_reading_passes_over_what_is_not_a_whole_object(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"step": 1}\n\x00\x00\n[1]\n\n{"step": 2}\n{"step": 3, "lo')
    assert [record["step"] for _, record in read_lines(path)] == [1, 2]


def test_a_missing_file_has_no_lines(tmp_path):
    assert list(read_lines(tmp_path / "none.jsonl")) == []


def test_the_last_record_is_that_of_the_last_whole_line(tmp_path):
    path = tmp_path / "x.jsonl"
    assert last_record(path) is None
    path.write_bytes(b'{"step": 1, "text": "' + b"x" * 200_000 + b'"}\n\x00\x00\n[1]\n{"step": 3, "lo')
    assert (last_record(path) or {})["step"] == 1
    path.write_bytes(b"")
    assert last_record(path) is None
