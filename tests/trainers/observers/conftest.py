import sys
from types import SimpleNamespace

import numpy as np
import pytest

from trainwright.configs.schema import Recipe
from trainwright.trainers.observers.base import Observer, Progress, Run


def metrics_at(step, **more):
    return {
        "step": step,
        "tokens": step * 2048,
        "loss": 8.0 - step / 7,
        "lr": 3e-4,
        "grad_norm": 1.2345,
        "param_norm": 80.5,
        "tokens_per_s": 12345.6,
        "step_time_s": 0.1659,
        "data_time_s": 0.0012,
        "memory_gib": 1.25,
        **more,
    }


def progress_at(step):
    return Progress(step, step * 2048, np.zeros((1, 1), np.int64))


@pytest.fixture
def drive(tmp_path):
    """Drive an observer through steps as the loop does; a resumed run is a second call with first > 1."""

    def steps(observer: Observer, first=1, last=5, total=5, stop="done", events=(), again=False, **more):
        recipe = Recipe()
        recipe.run.name = "a run"
        run = Run(recipe, tmp_path, total, 5_900_000, 1, observer.on_event, again)
        observer.on_start(run, progress_at(first - 1))
        for event, fields in events:
            observer.on_event(event, fields)
        for step in range(first, last + 1):
            observer.on_step(progress_at(step), metrics_at(step, **more.get(f"at_{step}", {})))
        if stop:
            observer.on_stop(progress_at(last), stop)

    return steps


@pytest.fixture
def fake_module(monkeypatch):
    """Put a small stand-in for an optional package in sys.modules."""

    def put(name, **attributes):
        module = SimpleNamespace(**attributes)
        monkeypatch.setitem(sys.modules, name, module)
        return module

    return put
