import sys
from types import SimpleNamespace

import pytest

from trainwright.errors import BadRequest, RunFailed
from trainwright.trainers.observers.mlflow import MLflow


class Refusal(Exception):
    pass


class Store:
    """A stand-in for MLflow's client and the server behind it."""

    def __init__(self):
        self.runs = {}
        self.batches = []
        self.status = {}

    def create_run(self, experiment, tags, run_name):
        self.runs[f"run{len(self.runs)}"] = tags
        return SimpleNamespace(info=SimpleNamespace(run_id=f"run{len(self.runs) - 1}"))

    def search_runs(self, experiments, query, max_results):
        found = [key for key, tags in reversed(self.runs.items()) if f"'{tags['trainwright.run']}'" in query]
        return [SimpleNamespace(info=SimpleNamespace(run_id=key)) for key in found[:max_results]]

    def log_batch(self, run_id, metrics=(), params=(), tags=(), synchronous=True):
        self.batches.append((run_id, list(metrics), list(params), list(tags), synchronous))

    def update_run(self, run_id, status):
        self.status[run_id] = status

    def set_terminated(self, run_id, status):
        self.status[run_id] = status


@pytest.fixture
def store(fake_module):
    store = Store()
    fake_module(
        "mlflow.entities", Metric=lambda *point: point, Param=lambda *pair: pair, RunTag=lambda *pair: pair
    )
    store.module = fake_module(
        "mlflow",
        MlflowClient=lambda: store,
        MlflowException=Refusal,
        set_experiment=lambda name: SimpleNamespace(experiment_id=name),
        flush_async_logging=lambda: store.batches.append("flushed"),
    )
    return store


def test_a_resumed_run_goes_on_under_its_id(store, drive):
    drive(MLflow(), last=3, stop="SIGTERM")
    assert store.status == {"run0": "FAILED"}
    drive(MLflow(), first=3, last=4)
    assert list(store.runs) == ["run0"]
    assert store.status == {"run0": "FINISHED"}
    points = [point for batch in store.batches if batch != "flushed" for point in batch[1]]
    assert [step for name, _, _, step in points if name == "loss"] == [1, 2, 3, 3, 4]
    assert store.batches[-1] == "flushed"


def test_parameters_are_written_once_and_steps_in_the_background(store, drive):
    drive(MLflow(), last=1)
    drive(MLflow(), first=2, last=2)
    written = [batch for batch in store.batches if batch != "flushed" and batch[2]]
    assert len(written) == 1
    assert ("optim.lr", "0.001") in written[0][2]
    assert all(not batch[4] for batch in store.batches if batch != "flushed" and batch[1])


def test_a_run_from_the_start_is_a_new_one(store, drive):
    drive(MLflow(), last=1)
    drive(MLflow(), last=1)
    assert list(store.runs) == ["run0", "run1"]


def test_a_run_that_is_rolled_back_to_its_beginning_is_the_same(store, drive):
    observer = MLflow()
    drive(observer, last=1, stop="rolled back: a spike")
    drive(observer, last=1, again=True)
    assert list(store.runs) == ["run0"]


def test_events_are_tags_within_the_limit(store, drive):
    drive(MLflow(), last=1, events=[("sample", {"text": "x" * 9000})])
    ((name, value),) = next(batch[3] for batch in store.batches if batch[3])
    assert name == "event.sample"
    assert len(value) == 5000


def test_a_server_that_refuses_is_worth_a_retry(store, drive):
    def refuse(name):
        raise Refusal("connection refused")

    store.module.set_experiment = refuse
    with pytest.raises(RunFailed, match=r"monitor\.mlflow=true.*connection refused"):
        drive(MLflow())


def test_a_local_store_without_its_packages_says_what_to_install(store, drive):
    def lacking():
        raise ModuleNotFoundError("No module named 'alembic'", name="alembic")

    store.module.MlflowClient = lacking
    with pytest.raises(BadRequest, match="needs the package alembic: pip install mlflow"):
        drive(MLflow())


def test_a_missing_package_is_a_bad_request_that_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(BadRequest, match=r"monitor\.mlflow=true needs .*pip install 'trainwright\[track\]'"):
        MLflow()


def test_a_server_that_is_gone_at_the_end_does_not_fail_the_run(store, drive, caplog):
    def gone(*arguments):
        raise Refusal("connection refused")

    store.set_terminated = gone
    drive(MLflow(), last=1)
    assert "MLflow did not take the end of the run" in caplog.text
