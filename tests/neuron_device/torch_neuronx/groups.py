"""The process group's backend `neuron`: gloo's, on the CPU tensors inside. `limits` has what it refuses."""

from datetime import timedelta

import torch.distributed as dist


def _make(store: dist.Store, rank: int, size: int, timeout: timedelta) -> dist.ProcessGroupGloo:
    return dist.ProcessGroupGloo(store, rank, size, timeout)


dist.Backend.register_backend("neuron", _make, devices=["neuron"])
