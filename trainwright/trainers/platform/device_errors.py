"""What a device's library says when it fails, and which of our errors that is. It needs no torch."""

import re
from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple

from trainwright.errors import BadNode, BadRequest, NumericalFailure, RunFailed, TrainwrightError

# What is in every line that tells of a failure in the tables, and in few others. To look for it is quick.
TELLING = re.compile(
    r"err|fail|nrt_(?!infodump)|ncc_|uncorrect|abort|status|timeout|mismatch|not available|in use|dge |hang"
    r"|lost|fallen|xid|memory"
)
LINE = 200  # characters of what was said that are said again


class Asks(Enum):
    """What has to be done about a failure."""

    RESTART = "start again"
    REPLACE = "replace the node"
    REBOOT = "reload the device's driver or reboot the node"
    REDUCE = (
        "lower train.micro_batch_size, set train.activation_checkpointing=full, or cut the model further by "
        "parallel.tp or parallel.zero=3"
    )
    REINSTALL = "make the versions fit"
    NUMBERS = "look at the steps before it"


ERRORS: dict[Asks, type[TrainwrightError]] = {
    Asks.RESTART: RunFailed,
    Asks.REPLACE: BadNode,
    Asks.REBOOT: BadNode,
    Asks.REDUCE: BadRequest,
    Asks.REINSTALL: BadRequest,
    Asks.NUMBERS: NumericalFailure,
}


class Known(NamedTuple):
    """A failure that is known by what its library says.

    pattern: a regular expression for a part of it, in whatever case. advice: what to do, where it is more than
    `asks` says.
    """

    name: str
    pattern: str
    meaning: str
    asks: Asks
    advice: str = ""

    def sentence(self) -> str:
        """The meaning, the name, and what to do."""
        return f"{self.meaning} ({self.name}): {self.advice or self.asks.value}"

    @property
    def of_the_node(self) -> bool:
        """Whether another node has to take this one's place."""
        return ERRORS[self.asks] is BadNode

    def error(self, text: str, worked: bool) -> TrainwrightError:
        """The error to raise, with the line of `text` that tells it. worked: some steps were made before.

        Memory that was enough for them may be so again: worth a retry.
        """
        kind = ERRORS[self.asks]
        if self.asks is Asks.REDUCE and worked:
            kind = RunFailed
        return kind(f"{self.sentence()}; it said: {self._line(text)}")

    def _line(self, text: str) -> str:
        found = re.search(self.pattern, text, re.IGNORECASE)
        at = found.start() if found else 0
        line = text[text.rfind("\n", 0, at) + 1 :].partition("\n")[0]
        return " ".join(line.split())[:LINE]


def known_in(text: str, table: Sequence[Known]) -> Known | None:
    """The first of the table's failures that the text tells of: the table's order says which cause counts."""
    return next((known for known in table if re.search(known.pattern, text, re.IGNORECASE)), None)


def tells(line: str) -> bool:
    """Whether a line may tell of a failure."""
    return TELLING.search(line.lower()) is not None
