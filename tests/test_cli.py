import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from trainwright import verdict
from trainwright.cli import VERBS, main


def trainwright(*words: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "trainwright", *words], capture_output=True, text=True, timeout=120, **options
    )


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_an_example_in_the_help(verb: str, capsys: pytest.CaptureFixture[str]):
    assert main(["--help"]) == 0
    assert f"  trainwright {verb}" in capsys.readouterr().out


def test_help_needs_neither_torch_nor_hydra():
    code = "import sys, trainwright.cli as c; c.main(['--help']); print([*{'torch', 'hydra'} & {*sys.modules}])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["trian"], f"trian is not a verb of trainwright: {', '.join(VERBS)} are"),
        (["train", "train.stpes=3"], "train.stpes is not a key of a recipe; the nearest is train.steps"),
        (
            ["train", "train.stpes=1,2", "--multirun"],
            "train.stpes is not a key of a recipe; the nearest is train.steps",
        ),
        (["train", "platform=tpu"], "platform takes auto or cpu or cuda or neuron, not 'tpu'"),
    ],
)
def test_a_bad_request_is_one_sentence_and_status_2(words: list[str], sentence: str, tmp_path: Path):
    done = trainwright(*words, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, f"trainwright: {sentence}\n")


def test_debug_shows_the_traceback_and_keeps_the_status():
    done = trainwright("train", "platform=tpu", "--debug")
    assert done.returncode == 2
    assert "Traceback" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize(("verb", "does"), [("train", "_run"), ("launch", "_launch")])
def test_a_notice_while_it_still_imports_is_a_preemption(verb: str, does: str, number: signal.Signals):
    code = "import os, sys; from trainwright import cli; "
    code += f"cli.{does} = lambda *_: os.kill(os.getpid(), {number.value}); sys.exit(cli.main(['{verb}']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 75
    assert done.stderr.startswith(f"trainwright: {number.name} came before the first step")


def test_a_worker_that_still_imports_leaves_word_of_a_notice(tmp_path: Path):
    code = "import os, sys; from trainwright import cli; "
    code += "cli._run = lambda *_: os.kill(os.getpid(), 10); sys.exit(cli.main(['train']))"
    environment = {**os.environ, verdict.FOLDER: str(tmp_path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, timeout=60).returncode == 75
    (left,) = tmp_path.glob("*.json")
    assert json.loads(left.read_text())["status"] == 75


def test_signals_are_as_before_when_a_verb_has_ended():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    main(["train", "platform=tpu"])
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before


def test_hydras_own_habits_work(tmp_path: Path):
    printed = trainwright("train", "optim.lr=0.25", "--cfg", "job", "--package", "optim", cwd=tmp_path)
    assert "lr: 0.25" in printed.stdout
    shown = trainwright("train", "--help", cwd=tmp_path).stdout
    assert "trainwright train optim.lr=1e-3,3e-3 --multirun" in shown
    assert "model: " in shown
    (tmp_path / "mine" / "recipe").mkdir(parents=True)
    (tmp_path / "mine" / "recipe" / "own.yaml").write_text("# @package _global_\nseed: 77\n")
    mine = trainwright("train", "recipe=own", "--config-dir", "mine", "--cfg", "job", cwd=tmp_path)
    assert "seed: 77" in mine.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_tab_completion_offers_keys_and_options():
    line = {"COMP_LINE": "trainwright train model=llama_", "COMP_POINT": "30", "PATH": ""}
    done = trainwright("-sc", "query=bash", env=line)
    assert "model=llama_34m" in done.stdout
