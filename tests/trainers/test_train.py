"""Whole runs of a tiny recipe through the command line's door."""

import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from trainwright.cli import main
from trainwright.errors import RunFailed
from trainwright.trainers.checkpoint import save
from trainwright.trainers.data.batch import Batch
from trainwright.trainers.steppers.eager import EagerStepper

TIMED = {"tokens_per_s", "step_time_s", "data_time_s", "memory_gib", "mfu", "samples_per_s"}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def computed(folder: Path) -> list[dict]:
    """metrics.jsonl without what depends on the machine's speed."""
    return [{k: v for k, v in line.items() if k not in TIMED} for line in lines(folder / "metrics.jsonl")]


SHOWN = ("start", "resume", "checkpoint", "sample", "stop")


def events(folder: Path, name: str) -> list[dict]:
    return [event for event in lines(folder / "events.jsonl") if event["event"] == name]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "tiny"


def test_a_run_leaves_what_the_design_promises(
    tiny: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["train", *tiny, "monitor.tensorboard=true", "monitor.sample_prompt=the"]) == 0
    metrics = lines(folder / "metrics.jsonl")
    assert [line["step"] for line in metrics] == list(range(1, 13))
    wanted = {"step", "tokens", "loss", "lr", "grad_norm", "param_norm", "epoch"} | TIMED - {
        "mfu",
        "samples_per_s",
    }
    assert all(wanted <= line.keys() for line in metrics)
    assert [line["step"] for line in metrics if "val_loss" in line] == [6, 12]
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
        "step_00000010",
        "step_00000012",
    ]
    assert (folder / "report.html").stat().st_size > 0
    assert list((folder / "tensorboard").iterdir())
    happened = [e["event"] for e in lines(folder / "events.jsonl") if e["event"] != "checkpoint_begun"]
    saved = ["checkpoint"] * 3
    assert happened == ["start", "health", "unigram", "initial_norm", *saved, "sample", "goodput", "stop"]
    printed = capsys.readouterr().out
    assert "step=12 loss=" in printed
    assert f"report={folder / 'report.html'}" in printed


@pytest.mark.parametrize(
    "precision",
    [pytest.param("fp32", marks=pytest.mark.slow), pytest.param("mixed", marks=pytest.mark.slow), "bf16_sr"],
)
def test_a_killed_run_resumes_bit_for_bit(tiny: list[str], folder: Path, tmp_path: Path, precision: str):
    words = [*tiny, f"precision={precision}", "checkpoint.every=3", "train.steps=40", "optim.warmup_steps=5"]
    assert main(["train", *words, "run.name=whole"]) == 0

    command = [sys.executable, "-m", "trainwright", "train", *words]
    draw = random.Random()
    for _ in range(2):
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        until = draw.randint(2, 10)
        for _ in range(until):
            if not child.stdout.readline():
                break
        time.sleep(draw.random() * 0.05)
        os.kill(child.pid, signal.SIGKILL)
        child.communicate(timeout=60)
    assert subprocess.run(command, timeout=300, capture_output=True).returncode == 0
    assert computed(folder) == computed(tmp_path / "runs" / "whole")


def test_the_cut_into_micro_batches_changes_nothing(tiny: list[str], tmp_path: Path):
    for size in (1, 4):
        assert main(["train", *tiny, f"train.micro_batch_size={size}", f"run.name=cut{size}"]) == 0
    one, four = (computed(tmp_path / "runs" / f"cut{size}") for size in (1, 4))
    for a, b in zip(one, four, strict=True):
        assert a["tokens"] == b["tokens"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_bf16_compute_follows_fp32(tiny: list[str], tmp_path: Path):
    for mode in ("fp32", "mixed"):
        assert main(["train", *tiny, f"precision={mode}", f"run.name={mode}"]) == 0
    fp32, mixed = (computed(tmp_path / "runs" / mode) for mode in ("fp32", "mixed"))
    for a, b in zip(fp32, mixed, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-2)


def test_a_finished_run_says_so_and_names_the_keys(
    tiny: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["train", *tiny]) == 0
    before = (folder / "metrics.jsonl").read_text()
    assert main(["train", *tiny]) == 0
    said = capsys.readouterr().err
    assert "at step 12 and it is finished" in said
    assert "run.name=tiny train.steps=24" in said
    assert "resume=none" in said
    assert (folder / "metrics.jsonl").read_text() == before

    assert main(["train", *tiny, "train.steps=14"]) == 0
    assert [line["step"] for line in lines(folder / "metrics.jsonl")] == list(range(1, 15))
    assert main(["train", *tiny, "train.steps=3", "resume=none"]) == 0
    assert len(lines(folder / "metrics.jsonl")) == 3
    assert len(lines(folder.with_name("tiny.1") / "metrics.jsonl")) == 14


def test_the_data_may_end_before_the_steps(tiny: list[str], folder: Path, capsys: pytest.CaptureFixture[str]):
    words = [*tiny, "train.epochs=1", "train.steps=100000", "train.validate_every=null", "train.seq_len=256"]
    assert main(["train", *words]) == 0
    last = lines(folder / "metrics.jsonl")[-1]
    assert 0.9 < last["epoch"] <= 1.0
    assert events(folder, "validation")[0]["step"] == last["step"]
    assert main(["train", *words]) == 0
    said = capsys.readouterr().err
    assert "its data has ended: go on with run.name=tiny train.epochs=2" in said
    assert main(["train", *words, "train.epochs=2"]) == 0
    assert 1.9 < lines(folder / "metrics.jsonl")[-1]["epoch"] <= 2.0


def test_a_turn_of_lanes_that_have_all_ended_is_no_step(tiny: list[str], folder: Path):
    words = [
        "data.lanes=8",
        "train.global_batch_size=2",
        "train.epochs=1",
        "train.steps=null",
        "train.seq_len=128",
    ]
    assert main(["train", *tiny, *words]) == 0
    metrics = lines(folder / "metrics.jsonl")
    assert all(line["loss"] is not None for line in metrics)
    assert [line["step"] for line in metrics] == list(range(1, len(metrics) + 1))


def test_numbers_that_are_not_finite_end_the_run(
    tiny: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["train", *tiny, "optim.lr=1e30", "optim.clip=null"]) == 76
    assert "lower optim.lr" in capsys.readouterr().err
    assert not list((folder / "checkpoints").glob("step_*"))


def test_a_damaged_checkpoint_is_passed_over(tiny: list[str], folder: Path, tmp_path: Path):
    assert main(["train", *tiny, "run.name=whole"]) == 0
    assert main(["train", *tiny, "train.steps=10"]) == 0
    newest = folder / "checkpoints" / "step_00000010" / "state" / "__0_0.distcp"
    damaged = bytearray(newest.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    newest.write_bytes(damaged)
    assert main(["train", *tiny]) == 0
    assert events(folder, "checkpoint_passed_over")[0]["reason"] == "state/__0_0.distcp is damaged"
    [resumed] = events(folder, "resume")
    assert resumed["step"] == 5
    assert resumed["changed"] == {"train.steps": [10, 12]}
    assert computed(folder) == computed(tmp_path / "runs" / "whole")


def test_resume_takes_a_checkpoint_of_another_run(tiny: list[str], tmp_path: Path):
    assert main(["train", *tiny]) == 0
    path = tmp_path / "runs" / "tiny" / "checkpoints" / "step_00000010"
    assert main(["train", *tiny, "run.name=next", f"resume={path}"]) == 0
    assert computed(tmp_path / "runs" / "next") == computed(tmp_path / "runs" / "tiny")[10:]


def test_what_cannot_be_resumed_is_refused(
    tiny: list[str], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["train", *tiny, "train.steps=5"]) == 0
    path = folder / "checkpoints" / "step_00000005"
    assert main(["train", *tiny, "train.seq_len=16"]) == 2
    assert "train.seq_len=32 and the recipe says 16" in capsys.readouterr().err
    assert main(["train", *tiny, "run.name=b", f"resume={tmp_path / 'no'}"]) == 2
    assert "there is no such folder" in capsys.readouterr().err
    assert main(["train", *tiny, "model.coalesce=false"]) == 2
    assert "model.coalesce=True and the recipe says False" in capsys.readouterr().err
    (path / "manifest.json").unlink()
    assert main(["train", *tiny, "run.name=b", f"resume={path}"]) == 2
    assert "it has no manifest" in capsys.readouterr().err


def test_a_disk_that_fills_up_under_the_writer_is_said_in_a_sentence(tiny: list[str], folder: Path):
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))  # less than the weights take

    command = [sys.executable, "-m", "trainwright", "train", *tiny]
    done = subprocess.run(command, preexec_fn=limit, timeout=120, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("trainwright: the last checkpoint couldn't be saved")
    assert [event["step"] for event in events(folder, "checkpoint_failed")] == [5, 10, 12]
    assert list((folder / "checkpoints").iterdir()) == []


def test_a_full_disk_leaves_the_last_good_checkpoint(
    tiny: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    whole, written = save.write_manifest, []

    def full(*args: Any) -> None:
        written.append(args)
        if len(written) > 1:
            raise OSError(28, "No space left on device")
        whole(*args)

    monkeypatch.setattr(save, "write_manifest", full)
    assert main(["train", *tiny]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_00000005"]
    assert events(folder, "checkpoint_failed")[0]["step"] == 10
    assert len(lines(folder / "metrics.jsonl")) == 12

    monkeypatch.undo()
    assert main(["train", *tiny]) == 0
    assert events(folder, "resume")[0]["step"] == 5


def test_an_error_in_the_data_ends_the_run_in_one_sentence(
    tiny: list[str], corpus: Path, capsys: pytest.CaptureFixture[str]
):
    corpus.write_bytes(b"caf\xe9 au lait\n\nsecond\n")
    assert main(["train", *tiny]) == 2
    assert str(corpus) in capsys.readouterr().err


def test_a_sweep_trains_each_of_its_recipes(tiny: list[str], tmp_path: Path):
    words = [word for word in tiny if not word.startswith("run.name")]
    assert main(["train", *words, "seed=1,2", "--multirun"]) == 0
    runs = [path for path in (tmp_path / "runs").iterdir() if path.is_dir()]
    assert len(runs) == 2
    assert all(len(lines(run / "metrics.jsonl")) == 12 for run in runs)


def test_a_sweep_into_one_folder_is_refused(tiny: list[str], capsys: pytest.CaptureFixture[str]):
    assert main(["train", *tiny, "seed=1,2", "--multirun"]) == 2
    assert "run.name=tiny would put every run of the sweep into one folder" in capsys.readouterr().err


@pytest.mark.slow
def test_a_model_may_be_compiled(tiny: list[str], tmp_path: Path):
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    for name, compile in (("eager", "false"), ("compiled", "true")):
        assert main(["train", *tiny, f"train.compile={compile}", f"run.name={name}"]) == 0
    eager, compiled = (computed(tmp_path / "runs" / name) for name in ("eager", "compiled"))
    for a, b in zip(eager, compiled, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


@pytest.mark.parametrize("notice", [signal.SIGTERM, signal.SIGUSR1])
def test_a_notice_saves_and_ends_with_75(tiny: list[str], folder: Path, tmp_path: Path, notice: signal.Signals):
    words = [*tiny, "train.steps=60", "checkpoint.every=null"]
    assert main(["train", *words, "run.name=whole"]) == 0
    command = [sys.executable, "-m", "trainwright", "train", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith("step=3 "):
                child.send_signal(notice)
                break
        stderr = child.communicate(timeout=60)[1]
    assert child.returncode == 75
    step = events(folder, "checkpoint")[-1]["step"]
    assert 3 <= step < 60
    assert f"{notice.name} stopped the run after step {step}" in stderr
    assert main(["train", *words]) == 0
    assert events(folder, "resume")[0]["step"] == step
    assert computed(folder) == computed(tmp_path / "runs" / "whole")


def test_saves_by_the_clock(tiny: list[str], folder: Path):
    assert main(["train", *tiny, "train.steps=200", "checkpoint.every=null", "checkpoint.minutes=0.01"]) == 0
    steps = [event["step"] for event in events(folder, "checkpoint")]
    assert len(steps) > 1
    assert steps[-1] == 200


def test_the_interval_is_chosen_from_what_a_save_costs(tiny: list[str], folder: Path):
    words = ["train.steps=300", "checkpoint.every=auto", "cluster.failures_per_node_hour=36000"]
    assert main(["train", *tiny, *words]) == 0
    (chosen,) = events(folder, "checkpoint_interval")
    steps = [event["step"] for event in events(folder, "checkpoint")]
    assert steps[0] == 10
    assert len(steps) > 2
    assert chosen["seconds"] >= chosen["write_s"]


def test_a_failed_save_is_no_measure_of_what_saves_cost(
    tiny: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
):
    whole, written = save.write_manifest, []

    def full_at_first(*args: Any) -> None:
        written.append(args)
        if len(written) == 1:
            raise OSError(28, "No space left on device")
        whole(*args)

    monkeypatch.setattr(save, "write_manifest", full_at_first)
    assert main(["train", *tiny, "train.steps=400", "checkpoint.every=auto"]) == 0
    assert [event["step"] for event in events(folder, "checkpoint_failed")] == [10]
    assert events(folder, "checkpoint")[0]["step"] >= 20
    assert len(events(folder, "checkpoint_interval")) == 1


@pytest.fixture
def deadly(tiny: list[str], monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], None]:
    """`deadly(what)`: the batch that step 7 is meant to train on does `what`, wherever it comes."""
    compute, seen = EagerStepper.forward_backward, []

    def record(stepper: EagerStepper, batch: Batch, target_tokens: int) -> torch.Tensor:
        seen.append(batch.cursor.tobytes())
        return compute(stepper, batch, target_tokens)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EagerStepper, "forward_backward", record)
        assert main(["train", *tiny, "run.name=whole"]) == 0

    def arm(what: Callable[..., Any]) -> None:
        def deadly(stepper: EagerStepper, batch: Batch, target_tokens: int) -> torch.Tensor:
            kills = batch.cursor.tobytes() == seen[6]
            return what() if kills else compute(stepper, batch, target_tokens)

        monkeypatch.setattr(EagerStepper, "forward_backward", deadly)

    return arm


def die() -> None:
    raise RunFailed("the batch is too much")


@pytest.mark.parametrize("every", [5, 6])  # the batch is that of the second or the first step after a resume
def test_a_batch_that_kills_twice_is_said(
    tiny: list[str], folder: Path, deadly: Callable[..., None], every: int
):
    deadly(die)
    words = [*tiny, f"checkpoint.every={every}"]
    assert [main(["train", *words]) for _ in range(3)] == [1, 1, 1]
    assert [event["died_in"] for event in events(folder, "resume")] == [7, 7]
    assert [event["step"] for event in events(folder, "batch_killed_twice")] == [7]


@pytest.mark.parametrize("what", [die, lambda: torch.tensor(math.nan)], ids=["dies", "is not finite"])
def test_a_batch_that_kills_twice_may_be_left_out(
    tiny: list[str], folder: Path, tmp_path: Path, deadly: Callable[..., None], what: Callable[[], Any]
):
    words = [*tiny, "resilience.pass_over_batch=true"]
    deadly(what)
    assert [main(["train", *words]) for _ in range(3)] == [1, 1, 0]
    assert [event["step"] for event in events(folder, "batch_left_out")] == [7]
    whole, ours = computed(tmp_path / "runs" / "whole"), computed(folder)
    assert ours[:6] == whole[:6]
    assert [line["step"] for line in ours] == list(range(1, 13))
    # Its place is taken by the next batch, and so on.
    assert [b["tokens"] - a["tokens"] for a, b in pairwise(ours[5:])] == [
        b["tokens"] - a["tokens"] for a, b in pairwise(whole[6:])
    ] + [ours[-1]["tokens"] - ours[-2]["tokens"]]


def test_numbers_that_stay_bad_without_the_batch_end_the_run(tiny: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(EagerStepper, "forward_backward", lambda *_: torch.tensor(math.nan))
    words = [*tiny, "resilience.pass_over_batch=true"]
    assert [main(["train", *words]) for _ in range(3)] == [1, 1, 76]
