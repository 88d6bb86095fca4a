"""What a process's threads are doing, told without reading a file: the hang may be that of a disk."""

import os
import re
import sys
import threading
from types import FrameType

import trainwright

# A thread whose innermost frames are in one of these waits for other ranks, or for a device that does.
COLLECTIVES = (
    "torch/distributed/distributed_c10d.py",
    "torch/distributed/_functional_collectives.py",
    "torch/distributed/fsdp/_fully_shard/_fsdp_collectives.py",
    "torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py",
    "trainwright/trainers/parallel/collectives.py",
    "trainwright/trainers/parallel/direct.py",
)
WAITS = {
    ("trainwright/trainers/facts.py", "read"),
    ("torch/distributed/pipelining/schedules.py", "_wait_batch_p2p"),
}
TRANSPORT = (*COLLECTIVES, "trainwright/trainers/parallel/ranks.py")  # who calls these is of interest
ROOT = os.path.dirname(trainwright.__file__).replace("\\", "/")
PACKAGES = re.compile(
    rf".*/site-packages/|{re.escape(os.path.dirname(ROOT))}/(?=trainwright/)|.*/lib/python3\.\d+/"
)
INNERMOST = 4  # a decorator and torch's operator call may stand between the collective and C++
DEBUGGERS = ("pdb.py", "bdb.py")


def all_stacks(main: int) -> str:
    """Every thread's Python stack, innermost frame first; thread `main`'s comes first."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sorted(sys._current_frames().items(), key=lambda one: one[0] != main)
    return "\n".join(
        f"Thread {names.get(ident, 'not of Python')} ({ident}), innermost call first:\n"
        + "".join(f"  {_place(part)}\n" for part in _outward(frame))
        for ident, frame in frames
    )


def collective(thread: int) -> str:
    """The collective that `thread` waits in, and the line of ours that needs it; nothing if it is in none."""
    frames = _stack(thread)
    inside = next((frame for frame in frames[:INNERMOST] if _waits(frame)), None)
    if inside is None:
        return ""
    callers = (frame for frame in frames if _ours(frame) and not _file(frame).endswith(TRANSPORT))
    return f"in {inside.f_code.co_name} for {_place(next(callers, inside))}"


def place(thread: int) -> str:
    """The line that `thread` is at, and the line of ours that called it."""
    frames = _stack(thread)
    if not frames:
        return "nowhere: its thread has ended"
    ours = next((frame for frame in frames if _ours(frame)), frames[0])
    return f"at {_place(frames[0])}" + ("" if ours is frames[0] else f" for {_place(ours)}")


def in_debugger(thread: int) -> bool:
    """Whether someone is looking at `thread` in Python's debugger."""
    return any(os.path.basename(frame.f_code.co_filename) in DEBUGGERS for frame in _stack(thread))


def _stack(thread: int) -> list[FrameType]:
    frame = sys._current_frames().get(thread)
    return _outward(frame) if frame else []


def _outward(frame: FrameType | None) -> list[FrameType]:
    frames = []
    while frame:
        frames.append(frame)
        frame = frame.f_back
    return frames


def _place(frame: FrameType) -> str:
    return f"{PACKAGES.sub('', _file(frame))}:{frame.f_lineno} ({frame.f_code.co_name})"


def _file(frame: FrameType) -> str:
    return frame.f_code.co_filename.replace("\\", "/")


def _ours(frame: FrameType) -> bool:
    return _file(frame).startswith(f"{ROOT}/")


def _waits(frame: FrameType) -> bool:
    if _file(frame).endswith(COLLECTIVES):
        return True
    return any(_file(frame).endswith(file) and frame.f_code.co_name == name for file, name in WAITS)
