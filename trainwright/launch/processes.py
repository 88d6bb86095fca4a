"""What the supervisor asks of the operating system, so that no process outlives it or escapes it.

torchrun starts each worker in a session of its own, so no signal to a group reaches them all. On Linux the
supervisor takes orphans as its children, and then all that it has to answer for stands below it.
"""

import ctypes
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
PAUSE = 0.05
UNKILLABLE = 30.0  # seconds after which a killed process that is still there is the kernel's: a device holds it
LINUX = sys.platform == "linux"


def adopt_orphans() -> None:
    """From now on a process below this one whose parent ends becomes this one's child."""
    if LINUX:
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


def end_with_parent() -> None:
    """Get SIGTERM when the parent ends, however it does; to be called in a new child before its program.

    The kernel goes by the thread that started the child, which must be the parent's main one.
    """
    if LINUX:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def below(top: int) -> dict[int, int]:
    """Every process below `top`, and the parent of each; none where there is no /proc."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has just ended
            # pid (name) state parent ...; a name may hold spaces and brackets
            parents[int(entry.parent.name)] = int(entry.read_text().rpartition(")")[2].split()[1])
    found: dict[int, int] = {}
    while more := {pid: up for pid, up in parents.items() if pid not in found and (up == top or up in found)}:
        found |= more
    return found


def there(pid: int) -> bool:
    """Whether there is such a process."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def end_all_below(seconds: float) -> None:
    """End all processes below this one: SIGTERM to its children, `seconds` later SIGKILL to all."""
    me = os.getpid()
    until = time.monotonic() + seconds
    told: set[int] = set()
    while (left := _reaped(below(me), me)) and time.monotonic() < until + UNKILLABLE:
        late = time.monotonic() > until
        for pid in left if late else {pid for pid, parent in left.items() if parent == me} - told:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL if late else signal.SIGTERM)
            told.add(pid)
        time.sleep(PAUSE)


def _reaped(found: dict[int, int], me: int) -> dict[int, int]:
    """`found` without the children of `me` that have ended, which are taken off the kernel's list."""
    left = dict(found)
    for pid in (pid for pid, parent in found.items() if parent == me):
        with suppress(ChildProcessError):
            if os.waitpid(pid, os.WNOHANG)[0]:
                del left[pid]
    return left
