"""The `cpu` platform."""

import ctypes
import mmap
import os
import platform
import re
import resource
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from trainwright.trainers.platform.base import Platform

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
SPARED = 0.05  # of the free memory: where all is taken, the kernel kills somebody
CGROUP = Path("/sys/fs/cgroup")


class Cpu(Platform):
    """Any machine."""

    name = "cpu"
    backend = "gloo"
    attention = "blockwise"
    sends_directly = True  # gloo's reduce-scatter is an all-reduce, and its all-gather goes round in a ring
    shares_memory = True
    is_the_host = True
    product_size = 256
    buffer_bytes = 1 << 22

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

    def work_clock(self) -> Callable[[], float] | None:
        """The thread's CPU time: gloo sleeps while it waits."""
        return time.thread_time

    def kind(self) -> str:
        """The processor's model, and what else decides in which order a product is added up."""
        model = platform.processor() or platform.machine()
        with suppress(OSError):
            if named := re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
                model = named.group(1)
        vectors = torch.backends.cpu.get_cpu_capability()
        return f"{model}, {vectors}, {torch.get_num_threads()} threads, torch {torch.__version__}"

    def free_memory(self) -> int:
        """What the kernel says is available, or what the container's limit leaves, less a little."""
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        with suppress(OSError):
            if said := re.search(r"^MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE):
                free = int(said.group(1)) * 1024
        with suppress(OSError, ValueError):  # no limit reads "max"
            limit, used = (int((CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
            cached = re.search(r"^inactive_file (\d+)", (CGROUP / "memory.stat").read_text(), re.MULTILINE)
            free = min(free, limit - used + (int(cached.group(1)) if cached else 0))
        return int(free * (1 - SPARED))

    def allocate(self, size: int) -> Tensor:
        """From the kernel and back to it when the tensor is gone: `prepare` has malloc keep what it gets."""
        return torch.frombuffer(mmap.mmap(-1, size), dtype=torch.int32, count=size // 4)
