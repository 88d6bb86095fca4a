"""The errors that end a run, each with the exit status that an orchestrator acts on."""

INTERRUPTED = 130  # the exit status after SIGINT, as of a shell


class TrainwrightError(Exception):
    """An error that is one sentence with the fix; the command line prints it without a traceback."""

    status = 1


class RunFailed(TrainwrightError):
    """The run broke for a reason outside the recipe and may succeed when tried again."""

    status = 1


class NumericalFailure(TrainwrightError):
    """The numbers went wrong: a loss or a norm isn't finite, or is what the recipe says to stop at."""

    status = 76


class Diverged(NumericalFailure):
    """The run as a whole has gone wrong: no single batch is to blame."""


class BadRequest(TrainwrightError):
    """The recipe, a file or a flag is wrong: trying again without a change can't succeed."""

    status = 2


class Preempted(TrainwrightError):
    """The machine was asked back: what was done is saved, and the same command goes on from there."""

    status = 75


class BadNode(TrainwrightError):
    """The node isn't fit to train on: another one has to take its place."""

    status = 77
