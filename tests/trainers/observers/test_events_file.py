import json
import math
import re

from trainwright.trainers.observers.events_file import EventsFile


def test_an_event_is_a_line_with_its_time_first(tmp_path):
    EventsFile(tmp_path).on_event("checkpoint", {"step": 100, "path": tmp_path, "loss": math.nan})
    record = json.loads((tmp_path / "events.jsonl").read_text())
    assert list(record) == ["time", "event", "step", "path", "loss"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", record["time"])
    assert (record["event"], record["path"], record["loss"]) == ("checkpoint", str(tmp_path), None)


def test_a_restart_appends(tmp_path, drive):
    for first in (1, 3):
        drive(EventsFile(tmp_path), first=first, events=[("start", {"step": first - 1})])
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 2]


def test_a_torn_line_does_not_spoil_the_next(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_text('{"time": "20')
    for step in (1, 2):
        EventsFile(tmp_path).on_event("checkpoint", {"step": step})
    torn, *whole = path.read_text().splitlines()
    assert torn == '{"time": "20'
    assert [json.loads(line)["step"] for line in whole] == [1, 2]
