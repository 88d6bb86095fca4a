"""What single ranks ask of all: made common by the step's all-reduce, so that all do it after the same step."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # by which spot machines, Slurm and Kubernetes give notice


class Wishes:
    """A rank's own wishes, and after each step's all-reduce what all are to do.

    save: to save after the step. busy: an earlier save is still being written, so not yet.
    stop: to save and end the run; the name of the signal that asked for it.
    agreed_save, agreed_stop: the same on every rank.
    """

    def __init__(self) -> None:
        self.save = False
        self.busy = False
        self.stop: str | None = None
        self.agreed_save = False
        self.agreed_stop = False

    def numbers(self) -> list[float]:
        """The rank's share of the sums that `agree` reads."""
        return [float(self.save), float(self.busy), float(self.stop is not None)]

    def agree(self, save: float, busy: float, stop: float) -> None:
        """Take in the sums over all ranks."""
        self.agreed_save = save > 0 and busy == 0
        self.agreed_stop = stop > 0


@contextmanager
def stopping_on_notice(wishes: Wishes) -> Iterator[None]:
    """Within the body SIGTERM and SIGUSR1 ask all ranks to save and stop after the step.

    Before it, with nothing to save, they end the process at once (`verdict.begin`).
    """

    def ask(number: int, _frame: FrameType | None) -> None:
        wishes.stop = signal.Signals(number).name

    try:
        before = {number: signal.signal(number, ask) for number in SIGNALS}
    except ValueError:  # Python gives signals to its main thread only, and this is another
        before = {}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
