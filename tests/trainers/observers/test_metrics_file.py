import json
import math

import pytest

from trainwright.trainers.observers.metrics_file import METRICS, MetricsFile


def steps_in(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


@pytest.fixture
def metrics(tmp_path):
    return tmp_path / "metrics.jsonl"


def test_a_line_a_step_with_the_keys_in_order(tmp_path, metrics, drive):
    more = {"aux_loss": 0.25, "mfu": 0.4, "val_loss": 2.5, "epoch": 0.5, "samples_per_s": 9.0}
    drive(MetricsFile(tmp_path), last=3, at_2=dict(reversed(more.items())))
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3]
    assert tuple(records[1]) == (*METRICS, "aux_loss")
    assert tuple(records[0]) == METRICS[:10]
    assert isinstance(records[0]["tokens"], int)


def test_each_line_is_on_file_before_the_next_step(tmp_path, metrics, drive):
    drive(MetricsFile(tmp_path), last=2, stop=None)
    assert steps_in(metrics) == [1, 2]


def test_a_loss_that_is_not_finite_is_null(tmp_path, metrics, drive):
    drive(MetricsFile(tmp_path), last=1, at_1={"loss": math.nan, "grad_norm": math.inf})
    record = json.loads(metrics.read_text(), parse_constant=pytest.fail)
    assert record["loss"] is None
    assert record["grad_norm"] is None


def test_a_resumed_run_moves_later_steps_aside(tmp_path, metrics, drive):
    redone = tmp_path / "metrics.redone.jsonl"
    drive(MetricsFile(tmp_path), last=5, stop=None)
    before = metrics.read_text().splitlines()
    drive(MetricsFile(tmp_path), first=4, last=7, stop=None)
    assert steps_in(metrics) == [1, 2, 3, 4, 5, 6, 7]
    assert metrics.read_text().splitlines()[:3] == before[:3]
    assert redone.read_text().splitlines() == before[3:]
    drive(MetricsFile(tmp_path), first=7, last=8)
    assert steps_in(metrics) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert steps_in(redone) == [4, 5, 7]


def test_starting_afresh_moves_everything_aside(tmp_path, metrics, drive):
    drive(MetricsFile(tmp_path), last=3)
    drive(MetricsFile(tmp_path), last=2)
    assert steps_in(metrics) == [1, 2]
    assert steps_in(tmp_path / "metrics.redone.jsonl") == [1, 2, 3]


def test_a_torn_last_line_is_dropped(tmp_path, metrics, drive):
    drive(MetricsFile(tmp_path), last=3)
    with metrics.open("a") as file:
        file.write('{"step": 4, "loss": 2.')
    drive(MetricsFile(tmp_path), first=4, last=5)
    assert steps_in(metrics) == [1, 2, 3, 4, 5]
    assert not (tmp_path / "metrics.redone.jsonl").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_whole_last_line_without_its_newline_is_kept(tmp_path, metrics, drive):
    drive(MetricsFile(tmp_path), last=3)
    metrics.write_text(metrics.read_text().rstrip("\n"))
    drive(MetricsFile(tmp_path), first=4, last=4)
    assert steps_in(metrics) == [1, 2, 3, 4]


def test_a_kill_before_the_rename_loses_nothing(tmp_path, metrics, drive, monkeypatch):
    drive(MetricsFile(tmp_path), last=5)

    def killed(source, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            drive(MetricsFile(tmp_path), first=4, last=5)
    assert steps_in(metrics) == [1, 2, 3, 4, 5]
    drive(MetricsFile(tmp_path), first=4, last=5)
    assert steps_in(metrics) == [1, 2, 3, 4, 5]
