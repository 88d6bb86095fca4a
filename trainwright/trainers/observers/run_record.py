"""What a run's folder says about the run, read back: whatever is missing or torn is passed over."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from trainwright.trainers.observers.json_lines import read_lines

Event = dict[str, Any]
Column = tuple[np.ndarray, np.ndarray]  # the steps that have a metric, and its values; null is NaN


@dataclass(frozen=True)
class RunRecord:
    """A run as its files tell it; what they don't tell is empty."""

    name: str
    config: dict[str, Any]
    config_text: str
    columns: dict[str, Column]
    events: list[Event]  # since the run last began at its first step
    goodput: dict[str, float]  # seconds by cause

    @property
    def last_step(self) -> int:
        return int(self.columns["step"][0].max()) if "step" in self.columns else 0

    def column(self, name: str) -> Column:
        return self.columns.get(name, (np.zeros(0), np.zeros(0)))

    def newest(self, name: str) -> float | None:
        """The last value of a metric; None where it was never measured."""
        values = self.column(name)[1]
        return float(values[-1]) if len(values) else None

    def section(self, name: str) -> dict[str, Any]:
        """A section of the recipe."""
        section = self.config.get(name)
        return section if isinstance(section, dict) else {}

    def of_kind(self, kind: str) -> list[Event]:
        return [event for event in self.events if event.get("event") == kind]

    def fact(self, *names: str) -> Any:
        """What the start or the configuration says under the first of `names` that either knows."""
        said = [*self.of_kind("start"), *self.of_kind("resume")]
        places = [*reversed(said), self.section("versions"), self.section("run"), self.config]
        known = (place[name] for name in names for place in places if place.get(name) is not None)
        return next(known, None)

    @property
    def seconds(self) -> float | None:
        """Wall time from the first start to the last thing known; None before the first step."""
        times = [datetime.fromisoformat(event["time"]) for event in self.events if _has_time(event)]
        between = (max(times) - min(times)).total_seconds() if times else 0.0
        return max(between, float(np.nansum(self.column("step_time_s")[1]))) or None


def read_run(folder: Path) -> RunRecord:
    """Read `config.yaml`, `metrics.jsonl`, `events.jsonl` and `goodput.json`, those that are there."""
    config_file = folder / "config.yaml"
    config = _config(config_file)
    run = config.get("run")
    name = run.get("name") if isinstance(run, dict) else None
    events = _this_run([record for _, record in read_lines(folder / "events.jsonl")])
    # What is measured after the last step has no line in metrics.jsonl: the event says it.
    late = [event for event in events if event.get("event") == "validation"]
    metrics = (record for _, record in read_lines(folder / "metrics.jsonl"))
    return RunRecord(
        name=str(name or folder.resolve().name),
        config=config,
        config_text=config_file.read_text(encoding="utf-8", errors="replace") if config_file.exists() else "",
        columns=_columns(chain(metrics, late)),
        events=events,
        goodput=_goodput(folder / "goodput.json"),
    )


def _config(path: Path) -> dict[str, Any]:
    try:
        config = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, ValueError, YAMLError, OmegaConfBaseException):
        return {}
    return {str(key): value for key, value in config.items()} if isinstance(config, dict) else {}


def _columns(records: Iterable[dict[str, Any]]) -> dict[str, Column]:
    steps: dict[str, list[int]] = {}
    values: dict[str, list[float]] = {}
    for record in records:
        if not isinstance(record.get("step"), int):
            continue
        for name, value in record.items():
            if value is None or isinstance(value, int | float):
                steps.setdefault(name, []).append(record["step"])
                values.setdefault(name, []).append(float("nan") if value is None else float(value))
    return {name: (np.array(steps[name]), np.array(values[name])) for name in steps}


def _this_run(events: list[Event]) -> list[Event]:
    """The events since the last start from nothing: the file also keeps what was there before it.

    A run that was rolled back to its beginning is still the same.
    """
    began = 0
    for i, event in enumerate(events):
        follower = events[i + 1].get("event") if i + 1 < len(events) else None
        rolled_back = i > 0 and events[i - 1].get("event") == "rollback"
        if event.get("event") == "start" and not (event.get("step") or rolled_back) and follower != "resume":
            began = i
    return events[began:]


def _goodput(path: Path) -> dict[str, float]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if isinstance(record, dict) and isinstance(record.get("seconds"), Mapping):
        record = record["seconds"]
    if not isinstance(record, dict):
        return {}
    numbers = {cause: value for cause, value in record.items() if type(value) in (int, float)}
    return {cause: float(value) for cause, value in numbers.items() if value > 0}


def _has_time(event: Event) -> bool:
    try:
        datetime.fromisoformat(event["time"])
    except (KeyError, TypeError, ValueError):
        return False
    return True
