"""events.jsonl: one JSON object for each thing that happened, over all the starts of a run."""

from datetime import UTC, datetime
from pathlib import Path

from trainwright.trainers.observers.base import Observer
from trainwright.trainers.observers.json_lines import end_torn_line, to_line


class EventsFile(Observer):
    """Appends `{"time": ..., "event": ..., **fields}` to `events.jsonl`; nothing is ever taken out of it.

    `time` is ISO-8601 in UTC with milliseconds. Events are rare, so the file is opened for each: it needs no
    start and no stop, and an event from before the first or after the last step is kept too.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "events.jsonl"

    def on_event(self, event: str, fields: dict[str, object]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        time = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line = to_line({"time": time, "event": event, **fields}) + "\n"
        with self.path.open("ab+") as file:
            end_torn_line(file)
            file.write(line.encode())
