"""What `torch.neuron` is: the device as torch and FSDP ask for it. One stream, on which all is done at once.

The process's core has index 0. On the real one it has the local rank's, but the autograd engine takes a device
that is registered from Python for a single one.
"""

import os
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

INDEX = 0
MEMORY = 24 << 30  # bytes: a trn2.48xlarge's, by its 64 logical cores


class Event:
    def record(self, stream: Any = None) -> "Event":
        return self

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


class Stream:
    def __init__(self, **options: Any) -> None: ...

    def wait_stream(self, stream: "Stream") -> None: ...

    def wait_event(self, event: Event) -> None: ...

    def record_event(self, event: Event | None = None) -> Event:
        return event or Event()

    def synchronize(self) -> None: ...


def require_group() -> None:
    """Raise where a rank of several uses the device before its process group is there."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        raise RuntimeError(
            "the device neuron is used before init_process_group, which has to set its runtime up"
        )


def is_available() -> bool:
    return True


def is_initialized() -> bool:
    return dist.is_initialized()


def device_count() -> int:
    return 1


def current_device() -> int:
    return INDEX


def set_device(device: Any) -> None:
    index = device if isinstance(device, int) else torch.device(device).index
    if index not in (None, INDEX):
        raise ValueError(f"Invalid device id: {index}: of the device neuron a process has its own core only")


def current_stream(device: Any = None) -> Stream:
    require_group()
    return Stream()


def stream(stream: Stream | None) -> AbstractContextManager[None]:
    return nullcontext()


def synchronize(device: Any = None) -> None:
    require_group()


def get_device_properties(device: Any = None) -> SimpleNamespace:
    require_group()
    return SimpleNamespace(name="neuron stand-in", total_memory=MEMORY)


def memory_allocated(device: Any = None) -> int:
    require_group()
    return 0


def max_memory_reserved(device: Any = None) -> int:
    require_group()
    return 0


def reset_peak_memory_stats(device: Any = None) -> None:
    require_group()


def empty_cache() -> None:
    require_group()


def get_amp_supported_dtype() -> list[torch.dtype]:
    return [torch.float32, torch.float16, torch.bfloat16]


def get_rng_state(device: Any = None) -> torch.Tensor:
    return torch.get_rng_state()  # nothing is drawn on the device


def set_rng_state(state: torch.Tensor, device: Any = None) -> None: ...


def manual_seed_all(seed: int) -> None: ...


def _is_in_bad_fork() -> bool:
    return False
