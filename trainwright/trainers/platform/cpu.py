"""The `cpu` platform."""

import ctypes
import platform
import resource
import sys

import torch

from trainwright.trainers.platform.base import Platform

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h


class Cpu(Platform):
    """Any machine."""

    name = "cpu"
    backend = "gloo"
    attention = "sdpa"
    sends_directly = True  # gloo's reduce-scatter is an all-reduce, and its all-gather goes round in a ring

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def prepare(self) -> None:
        """Keep freed memory in the process.

        By default glibc gives each large freed block back to the kernel, so that every activation of every
        step is made of fresh pages that have to be zeroed.
        """
        if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
            libc.mallopt(M_MMAP_MAX, 0)
            libc.mallopt(M_TRIM_THRESHOLD, -1)  # never

    def describe(self) -> str:
        """Processor and threads."""
        return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"

    def memory_gib(self) -> float:
        """The process's peak resident memory."""
        unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB elsewhere
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
