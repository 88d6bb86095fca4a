"""What is heard in the workers' stderr, and what becomes of it when our own is gone."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from trainwright.errors import BadNode, BadRequest, NumericalFailure, RunFailed, TrainwrightError
from trainwright.launch import last_words
from trainwright.launch.last_words import KEPT, LastWords
from trainwright.trainers.platform.neuron_errors import NEURON_ERRORS

STOPPED = b"[MLA 0][NC 0] DMA TX engine 0 is in an abort state\n"


@contextmanager
def stderr_is(end: int) -> Iterator[None]:
    kept = os.dup(2)
    os.dup2(end, 2)
    os.close(end)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def heard(says: bytes, again: bool = False) -> LastWords:
    """All of `says` has come through the pipe."""
    out, into = os.pipe()
    words = LastWords(os.fdopen(out, "rb"), NEURON_ERRORS, again)
    while says:
        says = says[os.write(into, says) :]
    os.close(into)
    words.wait(20.0)
    assert not words._thread.is_alive()
    return words


def test_a_dump_behind_the_failure_does_not_hide_it(tmp_path: Path):
    dump = b"2026-Oct-01 23:48:34.002205 516278:516289 NRT:nrt_infodump  ring 3: 0x1234 0x5678\n" * 40_000
    assert len(dump) > 10 * KEPT
    said, shown = STOPPED + dump, tmp_path / "stderr"
    with stderr_is(os.open(shown, os.O_WRONLY | os.O_CREAT)):
        words = heard(said)
    assert isinstance(words.explain(0.0, worked=True), BadNode)
    assert shown.read_bytes() == said


def test_what_was_said_before_a_worker_started_is_not_its():
    words = heard(STOPPED)
    assert words.explain(0.0, worked=False)
    assert words.explain(time.time(), worked=False) is None


def test_a_sentence_of_two_lines_and_one_without_an_end():
    error = heard(b"Uncorrectable HBM memory error.\nPlease reload the neuron driver").explain(0.0, worked=True)
    assert "1205" in str(error)


@pytest.mark.parametrize(
    ("says", "worked", "again", "kind"),
    [
        (b"NRT_RESOURCE", False, False, BadRequest),
        (b"NRT_RESOURCE", True, False, RunFailed),
        (b"INFER_ERROR_SUBTYPE_NUMERICAL", True, False, NumericalFailure),
        (b"INFER_ERROR_SUBTYPE_NUMERICAL", True, True, RunFailed),
    ],
)
def test_it_comes_to_what_an_exception_would(
    says: bytes, worked: bool, again: bool, kind: type[TrainwrightError]
):
    assert type(heard(says, again).explain(0.0, worked)) is kind


def closed() -> int:
    out, into = os.pipe()
    os.close(out)
    return into


def full() -> int:
    _, into = os.pipe()
    os.set_blocking(into, False)
    return into


@pytest.mark.parametrize("broken", [closed, full])
def test_workers_are_read_from_when_nobody_reads_from_us(
    broken: Callable[[], int], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(last_words, "PATIENCE", 0.01)
    with stderr_is(broken()):
        words = heard(b"of no interest\n" * 40_000 + STOPPED)
    assert isinstance(words.explain(0.0, worked=True), BadNode)
