"""The `cuda` platform."""

import os
from pathlib import Path

import torch

from trainwright.errors import BadRequest
from trainwright.trainers.platform.base import Platform, ToolReport
from trainwright.trainers.platform.cuda_errors import CUDA_ERRORS
from trainwright.trainers.platform.nvidia_tools import dcgm_diagnosis, dcgm_health, gpu_state

# NVIDIA's data sheets: dense bf16 FLOP/s, by a part of the device's name.
PEAK_BF16 = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "A10G": 70e12, "L40S": 362e12, "L4": 121e12}


class Cuda(Platform):
    """NVIDIA GPUs, one a process."""

    name = "cuda"
    backend = "cpu:gloo,cuda:nccl"
    attention = "flex"
    pins_memory = True
    failures = CUDA_ERRORS

    def __init__(self) -> None:
        alone = torch.cuda.device_count() == 1  # some launchers show each rank its own GPU only
        self.device = torch.device("cuda", 0 if alone else int(os.environ.get("LOCAL_RANK", "0")))

    def prepare(self) -> None:
        """Take this rank's GPU.

        Raises:
            BadRequest: more ranks than GPUs were started here.
        """
        if self.device.index >= torch.cuda.device_count():
            raise BadRequest(
                f"LOCAL_RANK={self.device.index} and torch sees {torch.cuda.device_count()} GPUs: start one "
                "process for each"
            )
        torch.cuda.set_device(self.device)

    def synchronize(self) -> None:
        """Wait for the GPU."""
        torch.cuda.synchronize(self.device)

    def describe(self) -> str:
        """The GPU's name."""
        return torch.cuda.get_device_name(self.device)

    def memory_gib(self) -> float:
        """Peak memory that PyTorch's allocator reserved."""
        return torch.cuda.max_memory_reserved(self.device) / 2**30

    def peak_flops(self, dtype: torch.dtype) -> float | None:
        """The data sheet's bf16 rate; none for fp32."""
        if dtype != torch.bfloat16:
            return None
        name = self.describe()
        return next((peak for part, peak in PEAK_BF16.items() if part in name), None)

    def dump_collectives(self, path: Path) -> None:
        """NCCL's flight recorder, a pickle that torch's `torchfrtrace` reads."""
        from torch._C import _distributed_c10d

        if dump := getattr(_distributed_c10d, "_dump_nccl_trace", None):
            path.write_bytes(dump())

    def kind(self) -> str:
        """The GPU's name, and the libraries that choose how a product is computed."""
        capability = ".".join(map(str, torch.cuda.get_device_capability(self.device)))
        return f"{self.describe()} ({capability}), CUDA {torch.version.cuda}, torch {torch.__version__}"

    def free_memory(self) -> int:
        """What the driver says is free, and what PyTorch's allocator keeps for later."""
        free, _ = torch.cuda.mem_get_info(self.device)
        kept = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return free + kept

    def give_back(self) -> None:
        """Empty PyTorch's cache, and forget that the peak was ours."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)

    def tools(self, *, first_on_node: bool, thorough: bool) -> list[ToolReport]:
        """nvidia-smi for this GPU; DCGM for the node's, its diagnosis only when there is time."""
        reports = [gpu_state(f"GPU-{torch.cuda.get_device_properties(self.device).uuid}")]
        if first_on_node:
            reports += [dcgm_health(), *([dcgm_diagnosis()] if thorough else [])]
        return reports
