import io
import json
import re

import pytest

from trainwright.trainers.observers.console import console
from trainwright.trainers.observers.console_display import ConsoleDisplay
from trainwright.trainers.observers.console_lines import ConsoleLines

SAGEMAKER = {
    "step": r"step=(\d+) loss=",
    "loss": r"step=\d+ loss=([0-9.]+)",
    "lr": r"\blr=([0-9.e+-]+)",
    "grad_norm": r"\bgrad_norm=([0-9.]+)",
    "param_norm": r"\bparam_norm=([0-9.]+)",
    "tokens_per_s": r"\btokens_per_s=([0-9.]+)",
    "memory_gib": r"\bmemory_gib=([0-9.]+)",
}


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def lines(drive):
    def printed(every=1, **kwargs):
        stream = io.StringIO()
        drive(console(every, stream), **kwargs)
        return stream.getvalue().splitlines()

    return printed


def shown_steps(lines):
    return [int(found.group(1)) for line in lines if (found := re.match(r"step=(\d+) ", line))]


def test_the_format_of_a_line_is_pinned(lines, monkeypatch):
    monkeypatch.setattr("time.monotonic", iter(range(0, 1000, 50)).__next__)
    first, _, _, last = lines(last=4, total=9, at_4={"val_loss": 2.5, "mfu": 0.4, "epoch": 1.25, "aux": 0.125})
    assert re.fullmatch(
        r"step=(\d+) loss=([0-9.]+) lr=3\.00e-04 grad_norm=1\.234 param_norm=80\.500 tokens_per_s=12346 "
        r"step_time_s=0\.166 data_time_s=0\.001 memory_gib=1\.25 tokens=2048",
        first,
    )
    assert last.endswith(" tokens=8192 mfu=0.400 val_loss=2.5000 epoch=1.25 aux=0.125 left=4m10s")


@pytest.mark.parametrize("name", SAGEMAKER)
def test_a_pattern_finds_each_metric_and_not_another(name, lines):
    text = "\n".join(lines(last=1, at_1={"val_loss": 99.5}, events=[("checkpoint", {"step": 100})]))
    (value,) = re.findall(SAGEMAKER[name], text)
    expected = {"step": 1, "loss": 8 - 1 / 7, "lr": 3e-4, "grad_norm": 1.2345, "param_norm": 80.5}
    expected |= {"tokens_per_s": 12345.6, "memory_gib": 1.25}
    assert float(value) == pytest.approx(expected[name], rel=1e-3)


def test_every_nth_step_and_the_first_the_last_and_the_validated(lines):
    printed = lines(every=5, last=12, total=12, at_8={"val_loss": 2.0})
    assert shown_steps(printed) == [1, 5, 8, 10, 12]


def test_the_first_step_after_a_resume_and_the_last_before_a_break(lines):
    assert shown_steps(lines(every=100, first=41, last=44, total=1000, stop="SIGTERM")) == [41, 44]


def test_values_that_do_not_exist_are_left_out(lines):
    (line,) = lines(last=1, total=None)
    assert "val_loss" not in line
    assert "left" not in line
    assert "None" not in line


def test_the_last_step_comes_before_the_stop(drive):
    stream = io.StringIO()
    observer = console(100, stream)
    drive(observer, last=3, total=3, stop=None)
    observer.on_event("stop", {"reason": "done"})
    observer.on_stop(None, "done")
    assert [line.split()[0] for line in stream.getvalue().splitlines()] == ["step=1", "step=3", "event=stop"]


def test_an_event_is_a_line_whose_values_are_words_or_quoted():
    stream = io.StringIO()
    fields = {"prompt": "def f():\n", "text": 'say "hi"', "nats": 6.21234567, "path": "a/b", "nothing": None}
    console(1, stream).on_event("sample", fields)
    (line,) = stream.getvalue().splitlines()
    assert line.startswith("event=sample prompt=")
    assert line.endswith("nats=6.21235 path=a/b")
    assert json.loads(re.search(r'prompt=(".*?[^\\]") ', line).group(1)) == "def f():\n"


def test_what_is_for_the_file_alone_is_no_line():
    stream = io.StringIO()
    console(1, stream).on_event("ranks", {"step": 50, "median_s": 0.4})
    console(1, stream).on_event("slow_rank", {"rank": 3})
    assert stream.getvalue() == "event=slow_rank rank=3\n"


def test_a_terminal_gets_the_display_and_a_log_the_lines(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert isinstance(console(1, Terminal()), ConsoleDisplay)
    assert isinstance(console(1, io.StringIO()), ConsoleLines)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(console(1, Terminal()), ConsoleLines)


def test_the_display_shows_the_newest_values_and_keeps_the_validation(drive, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    stream = Terminal()
    events = [("checkpoint", {"step": 0, "path": "runs/[x]"}), ("sample", {"prompt": "[b", "text": "old]"})]
    drive(ConsoleDisplay(stream), last=4, total=4, at_2={"val_loss": 2.5}, events=events)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert "checkpoint  step 0  path runs/[x]" in text
    assert "[bold]" in text
    assert "step 2      loss 7.7143  val 2.5000" in text
    bar, values = text.rstrip().splitlines()[-2:]
    assert re.match(r"a run ━+ 4/4", bar)
    assert values.strip() == "loss 7.4286  val 2.5000  tok/s 12,346  lr 3.00e-04"
