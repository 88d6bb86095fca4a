"""A program for launchers: trainwright with one rank that hangs once, in the way that the environment names.

HANG: the way. HANG_RANK: who. HANG_STEP: before which step. HANGS: a file that says how often it has hung.
"""

import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainwright import cli
from trainwright.trainers.steppers.eager import EagerStepper
from trainwright.trainers.tasks.pretrain import Pretraining

RANK, WAY, STEP = os.environ.get("RANK", "0"), os.environ["HANG"], int(os.environ["HANG_STEP"])
ONCE = Path(os.environ["HANGS"])


def hangs_now() -> bool:
    if os.environ["HANG_RANK"] != RANK or ONCE.exists():
        return False
    ONCE.write_text(f"{time.time()}")
    return True


def spin() -> None:
    while True:
        pass


WAYS = {
    "stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "asleep": lambda: time.sleep(1000),
    "spinning": spin,
    "locked": lambda: re.match(r"(a+)+$", "a" * 60 + "b"),  # in C, with Python's lock
}


def hanging_data(open_stream):
    @contextmanager
    def opened(*arguments) -> Iterator[Iterator]:
        with open_stream(*arguments) as stream:
            yield late(stream)

    def late(stream):
        for number, batch in enumerate(stream):
            if number == STEP and hangs_now():
                WAYS[WAY]()
            yield batch

    return opened


def hanging_forward(forward_backward):
    calls = []

    def call(*arguments):
        calls.append(1)
        if len(calls) == STEP and hangs_now():
            WAYS[WAY]()
        return forward_backward(*arguments)

    return call


if __name__ == "__main__":
    if os.environ.get("HANG_IN") == "data":
        Pretraining.open_stream = hanging_data(Pretraining.open_stream)
        original = Pretraining.open_stream
        Pretraining.open_stream = lambda self, *words: original(self, *words)
    else:
        wrapped = EagerStepper.forward_backward
        call = hanging_forward(wrapped)
        EagerStepper.forward_backward = lambda self, *words: call(self, *words)
    sys.exit(cli.main())
