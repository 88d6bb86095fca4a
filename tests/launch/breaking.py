"""Real training on a device that breaks: rank RANK says SAYS in step STEP, in an error or as it is KILLED."""

import os
import signal
import sys

from trainwright import cli
from trainwright.trainers.platform.cpu import Cpu
from trainwright.trainers.platform.neuron_errors import NEURON_ERRORS
from trainwright.trainers.steppers.eager import EagerStepper

RANK, STEP = 1, 3


def breaks(number: int) -> None:
    """Say it as the runtime does: in an error, or, where that ends the process, on stderr."""
    if os.environ["RANK"] != str(RANK) or number != STEP:
        return
    if "KILLED" in os.environ:
        os.write(2, f"{os.environ['SAYS']}\n".encode())
        os.kill(os.getpid(), signal.SIGABRT)
    raise RuntimeError(os.environ["SAYS"])


if __name__ == "__main__":
    Cpu.failures = NEURON_ERRORS
    right, steps = EagerStepper.forward_backward, iter(range(1, 1000))

    def breaking(self: EagerStepper, *args):
        breaks(next(steps))
        return right(self, *args)

    EagerStepper.forward_backward = breaking  # type: ignore[method-assign]
    sys.exit(cli.main())
