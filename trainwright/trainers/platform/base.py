"""What differs between devices, and nothing else: one small object per device."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from trainwright import verdict
from trainwright.errors import BadRequest
from trainwright.trainers.platform.device_errors import Known, known_in


class ToolReport(NamedTuple):
    """What a tool of the device's maker says of this rank's device or of its node.

    faults: what is broken, in words that follow "rank 3 has". note: what is worth reading besides.
    skipped: why the tool said nothing, or None.
    """

    tool: str
    faults: tuple[str, ...] = ()
    note: str = ""
    skipped: str | None = None


class Platform(ABC):
    """A device as the trainer sees it. Nothing outside this folder asks which one it is."""

    name: str  # the recipe's word for it
    backend: str  # the process group's backend string
    attention: str  # which of models.attention.KERNELS it trains with
    device: torch.device
    sends_directly = False  # ranks that send each other parts are faster than its gathers and reduce-scatters
    pins_memory = False  # copies to the host are faster into memory that is pinned
    shares_memory = False  # the ranks of a node have one memory between them
    is_the_host = False  # its memory is the host's: a whole batch is in it at once
    fuses_adamw = True  # torch's fused AdamW divides gradients there and takes a new learning rate each step
    compile_backend = "inductor"  # torch.compile's
    compiles_any_shape = True  # what is compiled for one shape may be for others too
    failures: Sequence[Known] = ()  # of its library, by what that says

    # The health check's: large enough to keep the whole device and its links busy, small enough to be quick.
    product_size = 2048  # rows of the matrix that is multiplied
    buffer_bytes = 1 << 28  # of the all-reduce that is timed

    @classmethod
    def register(cls) -> Exception | None:
        """Let torch know of the device, where it doesn't by itself; why that can't be."""
        return None

    def prepare(self) -> None:
        """Settings of the process; before the first tensor."""

    def round_stochastically(self, seed: int) -> None:
        """Switch the device's own stochastic rounding on; before the first tensor.

        Raises:
            BadRequest: it has none.
        """
        raise BadRequest(
            f"precision.rounding=hardware: {self.name} has no stochastic rounding of its own; use "
            "precision.rounding=optimizer"
        )

    def compiles(self) -> bool:
        """Whether torch.compile can be used: its backend is there."""
        return self.compile_backend in torch.compiler.list_backends(exclude_tags=())

    def require_compiler(self) -> None:
        """Refuse what has to be compiled where nothing can be.

        Raises:
            BadRequest: torch.compile doesn't know the device's backend.
        """
        if not self.compiles():
            raise BadRequest(
                f"train.compile=true: torch.compile has no backend {self.compile_backend} here; use "
                "train.compile=false"
            )

    def numbers(self, values: Sequence[float]) -> Tensor:
        """`values` on the device, float32, while the host goes on.

        For what differs from step to step: as a Python number in an operator's arguments it may be compiled in,
        and each step compiled anew.
        """
        host = torch.tensor(values, dtype=torch.float32, pin_memory=self.pins_memory)
        return host.to(self.device, non_blocking=True)

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Within the body a failure of the device's library that is known is raised as what it comes to.

        Raises:
            RunFailed, BadRequest, NumericalFailure, BadNode: by `failures`; any other error stays as it is.
        """
        try:
            yield
        except RuntimeError as error:
            known = known_in(str(error), self.failures)
            if known is None:
                raise
            raise known.error(str(error), verdict.has_worked()) from error

    def synchronize(self) -> None:
        """Wait for what was queued on the device."""

    @abstractmethod
    def describe(self) -> str:
        """The device in a few words, for config.yaml and the report."""

    @abstractmethod
    def memory_gib(self) -> float:
        """The most memory that the run has held on the device so far, in GiB."""

    def peak_flops(self, dtype: torch.dtype) -> float | None:
        """The device's published dense matrix-multiply rate in FLOP/s; None where there is no such figure."""
        return None

    def work_clock(self) -> Callable[[], float] | None:
        """Tells the seconds in which the calling thread has worked and not waited; None where nothing can."""
        return None

    def dump_collectives(self, path: Path) -> None:
        """Write what the device's library knows of the collectives in flight, where it keeps a record."""

    def kind(self) -> str:
        """Devices of one kind compute the same bits from the same numbers."""
        return f"{self.describe()}, torch {torch.__version__}"

    def product(self, matrix: Tensor) -> Tensor:
        """`matrix`, which is on the CPU, times itself as the device computes it; on the CPU."""
        here = matrix.to(self.device)
        return (here @ here).cpu()

    @abstractmethod
    def free_memory(self) -> int:
        """The bytes that can be had on the device; where ranks share it, by all those of the node together."""

    def allocate(self, size: int) -> Tensor:
        """`size` bytes of the device's memory, as int32.

        Raises:
            RuntimeError, OSError: they can't be had.
        """
        return torch.empty(size // 4, dtype=torch.int32, device=self.device)

    def give_back(self) -> None:
        """Return freed memory to the device, as if `allocate` had never been called."""

    def tools_before_use(self) -> list[ToolReport]:
        """What those of the maker's tools say that need all of a node's devices, before a rank has one."""
        return []

    def tools(self, *, first_on_node: bool, thorough: bool) -> list[ToolReport]:
        """What the maker's own tools say of this rank's device and, on a node's first rank, of the node.

        thorough: there is time for a diagnosis of some seconds.
        """
        return []
