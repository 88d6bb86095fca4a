"""Running the tools that devices' makers supply."""

import subprocess


class Unavailable(Exception):
    """A tool that isn't here, doesn't answer or fails; the text says which."""


def output_of(*command: str, timeout: float) -> str:
    """What `command` prints on stdout.

    Raises:
        Unavailable: it isn't on PATH, took more than `timeout` seconds, or failed.
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
        raise Unavailable(f"status {done.returncode}: {said}")
    return done.stdout
