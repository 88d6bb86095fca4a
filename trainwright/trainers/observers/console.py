"""The console: a live display in a terminal, one `key=value` line a step everywhere else."""

import sys
from typing import TextIO

from rich.console import Console

from trainwright.trainers.observers.base import Observer
from trainwright.trainers.observers.console_display import ConsoleDisplay
from trainwright.trainers.observers.console_lines import ConsoleLines


def console(every: int = 1, stream: TextIO | None = None) -> Observer:
    """What suits `stream` (stdout unless given): the display in a terminal, else a line every `every` steps."""
    stream = stream or sys.stdout
    # Rich alone would be talked into a display by FORCE_COLOR in a log file.
    if stream.isatty() and Console(file=stream).is_interactive:
        return ConsoleDisplay(stream)
    return ConsoleLines(every, stream)
