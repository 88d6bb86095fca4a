"""Processes in which the stand-in is found: workers of a pool of their own, and commands."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

SENDS = "NEURON_STAND_IN_SENDS"  # 1: ranks may send each other tensors of the device
HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def on_stand_in(function: Callable[..., Any], *args: Any) -> Any:
    """In a worker: what `function(*args)` returns where `platform=neuron` finds the stand-in."""
    if str(HERE) not in sys.path:
        sys.path.insert(0, str(HERE))
    return function(*args)


def command(*words: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    """A Python command that finds it, with what it printed; `variables` of its environment."""
    path = os.pathsep.join([str(HERE), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        [sys.executable, *words], env=environment, capture_output=True, text=True, timeout=120, cwd=ROOT
    )
