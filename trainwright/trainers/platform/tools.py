"""Running the tools that devices' makers supply."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from contextlib import suppress


class Unavailable(Exception):
    """A tool that isn't here, doesn't answer or fails; the text says which."""


class Failed(Unavailable):
    """A tool that ended with another status than 0. output: all that it printed."""

    def __init__(self, said: str, output: str) -> None:
        super().__init__(said)
        self.output = output


def output_of(*command: str, timeout: float) -> str:
    """What `command` prints on stdout.

    Raises:
        Unavailable: it isn't on PATH, or took more than `timeout` seconds.
        Failed: it ended with another status than 0.
    """
    with _started(command, stderr=subprocess.PIPE) as process:
        try:
            printed, errors = process.communicate(timeout=timeout)
        except BaseException as error:
            _end(process)
            if isinstance(error, subprocess.TimeoutExpired):
                raise Unavailable(f"no answer in {timeout:.0f} s") from None
            raise
    if process.returncode != 0:
        said = (errors.strip() or printed.strip() or "nothing said").splitlines()[0]
        raise Failed(f"status {process.returncode}: {said}", f"{printed}\n{errors}")
    return printed


def first_line_of(*command: str, timeout: float) -> str:
    """The first line that `command`, which goes on for ever, prints on stdout; it is ended then.

    Raises:
        Unavailable: it isn't on PATH, took more than `timeout` seconds, or ended without a line.
    """
    process = _started(command, stderr=subprocess.DEVNULL)
    started, timer = time.monotonic(), threading.Timer(timeout, lambda: _end(process))
    with process:
        timer.start()
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
        finally:
            timer.cancel()
            _end(process)
    if line:
        return line
    late = time.monotonic() - started >= timeout
    raise Unavailable(f"no answer in {timeout:.0f} s" if late else "it ended without a word")


def _started(command: Sequence[str], stderr: int) -> "subprocess.Popen[str]":
    """In a session of its own, so that what it starts can be ended with it."""
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except FileNotFoundError:
        raise Unavailable("not installed") from None
    except OSError as error:
        raise Unavailable(str(error)) from None


def _end(process: "subprocess.Popen[str]") -> None:
    """It and what it has started; before it is waited for, when its number may become another's."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
