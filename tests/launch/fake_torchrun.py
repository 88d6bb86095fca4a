"""A torchrun and its one worker without torch: the worker starts in a session of its own and hides its status.

    python fake_torchrun.py FOLDER WHAT

The worker leaves its pid in FOLDER/worker and torchrun its own in FOLDER/torchrun, one line a start. WHAT the
worker does: `wait` for SIGTERM and end with 75, `hang` whatever comes, or end with a status, as in `76`; `once`
is 75 of the first torchrun, and the next one starts no worker; `lost` is 1, after which torchrun waits.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from trainwright import verdict


def note(folder: Path, who: str) -> None:
    with (folder / who).open("a") as file:
        file.write(f"{os.getpid()}\n")


def work(what: str, folder: Path) -> None:
    def saved(number: int, frame: FrameType | None) -> None:
        verdict.leave(75, "saved at step 7")
        os._exit(75)

    verdict.begin()
    signal.signal(signal.SIGTERM, signal.SIG_IGN if what == "hang" else saved)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    note(folder, "worker")
    if what == "once":
        verdict.leave(75, "saved at step 7")
        sys.exit(75)
    if what == "lost":
        verdict.leave(1, "rank 0: lost the other ranks")
        sys.exit(1)
    if what.isdigit():
        verdict.leave(int(what), f"rank 0: ended with {what}")
        sys.exit(int(what))
    time.sleep(60)


def run(what: str, folder: Path) -> int:
    if what == "once" and (folder / "worker").exists():
        note(folder, "torchrun")
        return 1
    worker = subprocess.Popen([sys.executable, __file__, str(folder), what, "worker"], start_new_session=True)

    def hand_on(number: int, frame: FrameType | None) -> None:
        if worker.returncode is not None:
            sys.exit(1)
        worker.send_signal(number)

    signal.signal(signal.SIGTERM, hand_on)
    signal.signal(signal.SIGINT, hand_on)
    note(folder, "torchrun")
    status = worker.wait()
    note(folder, "ended")
    if what == "lost" or status in (2, 76, 77):
        time.sleep(60)  # it would start the worker again
    return 1 if status else 0


if __name__ == "__main__":
    here, wish = Path(sys.argv[1]), sys.argv[2]
    if sys.argv[3:] == ["worker"]:
        work(wish, here)
    else:
        sys.exit(run(wish, here))
