"""CUDA's failures, by what torch and the driver say. Numbers are NVIDIA's Xid errors of broken hardware."""

from collections.abc import Sequence

from trainwright.trainers.platform.device_errors import Asks, Known

CUDA_ERRORS: Sequence[Known] = (
    Known(
        "uncorrectable ECC",
        r"uncorrectable (?:ECC|NVLink) error|\bXid \([^)]*\): (?:48|64|79|95)\b",
        "the GPU had an error that nothing corrects",
        Asks.REPLACE,
    ),
    Known("GPU lost", r"GPU is lost|fallen off the bus", "the GPU doesn't answer any more", Asks.REPLACE),
    Known(
        "out of memory",
        r"CUDA out of memory|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED",
        "the GPU's memory is too small for this run",
        Asks.REDUCE,
    ),
)
