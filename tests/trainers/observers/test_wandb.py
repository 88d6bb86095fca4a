import math
import sys
from types import SimpleNamespace

import pytest

from trainwright.errors import BadRequest
from trainwright.trainers.observers.wandb import WandB


class Refusal(Exception):
    pass


@pytest.fixture
def wandb(fake_module):
    """A stand-in for wandb that remembers what it was told."""
    told = SimpleNamespace(inits=[], logged=[], defined=[], summary={}, exits=[])

    def init(**arguments):
        told.inits.append(arguments)
        return SimpleNamespace(
            log=told.logged.append,
            define_metric=lambda *names, **how: told.defined.append((names, how)),
            summary=told.summary,
            finish=lambda exit_code: told.exits.append(exit_code),
        )

    errors = SimpleNamespace(UsageError=Refusal, Error=Exception)
    told.module = fake_module("wandb", init=init, errors=errors)
    return told


def test_a_run_that_is_rolled_back_to_its_beginning_overwrites_nothing(wandb, drive):
    observer = WandB()
    drive(observer, last=1, stop="rolled back: a spike")
    drive(observer, last=1, again=True)
    assert [init["resume"] for init in wandb.inits] == [None, "allow"]


def test_a_resumed_run_keeps_its_id_and_draws_against_the_step(wandb, drive):
    drive(WandB(), last=3, stop="SIGTERM")
    drive(WandB(), first=3, last=4)
    fresh, resumed = wandb.inits
    assert fresh["id"] == resumed["id"]
    assert (fresh["resume"], resumed["resume"]) == (None, "allow")
    assert fresh["config"]["optim"]["lr"] == 1e-3
    assert [point["step"] for point in wandb.logged] == [1, 2, 3, 3, 4]
    assert (("*",), {"step_metric": "step"}) in wandb.defined
    assert wandb.exits == [1, 0]


def test_events_go_to_the_summary_as_plain_json(wandb, drive, tmp_path):
    drive(WandB(), events=[("checkpoint", {"step": 1, "path": tmp_path, "loss": math.nan})])
    assert wandb.summary == {"events/checkpoint": {"step": 1, "path": str(tmp_path), "loss": None}}


def test_a_missing_login_is_a_bad_request(wandb, drive):
    def refuse(**arguments):
        raise Refusal("No API key configured.")

    wandb.module.init = refuse
    with pytest.raises(BadRequest, match=r"monitor\.wandb=true.*No API key.*WANDB_MODE=offline"):
        drive(WandB())


def test_a_missing_package_is_a_bad_request_that_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(BadRequest, match=r"monitor\.wandb=true needs .*pip install 'trainwright\[track\]'"):
        WandB()
