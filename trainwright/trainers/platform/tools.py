"""Running the tools that devices' makers supply."""

import subprocess
import threading
import time


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
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=timeout
        )
    except FileNotFoundError:
        raise Unavailable("not installed") from None
    except subprocess.TimeoutExpired:
        raise Unavailable(f"no answer in {timeout:.0f} s") from None
    except OSError as error:
        raise Unavailable(str(error)) from None
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip() or "nothing said").splitlines()[0]
        raise Failed(f"status {done.returncode}: {said}", f"{done.stdout}\n{done.stderr}")
    return done.stdout


def first_line_of(*command: str, timeout: float) -> str:
    """The first line that `command`, which goes on for ever, prints on stdout; it is ended then.

    Raises:
        Unavailable: it isn't on PATH, took more than `timeout` seconds, or ended without a line.
    """
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            errors="replace",
        )
    except FileNotFoundError:
        raise Unavailable("not installed") from None
    except OSError as error:
        raise Unavailable(str(error)) from None
    started, timer = time.monotonic(), threading.Timer(timeout, process.kill)
    with process:
        timer.start()
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
        finally:
            timer.cancel()
            process.kill()
    if line:
        return line
    late = time.monotonic() - started >= timeout
    raise Unavailable(f"no answer in {timeout:.0f} s" if late else "it ended without a word")
