"""What a run's environment gets on each device, and which variables do nothing there any more. No torch.

A variable is given where the recipe and the launcher's own variables ask for it, and left as it is where it is
set already. docs/trainium.md has the table for readers.
"""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from trainwright.configs.schema import Recipe
from trainwright.trainers.platform.graph_cache import own_folder

ROUNDS = "NEURON_RT_STOCHASTIC_ROUNDING_EN"
SEED_BITS = 31  # that fit the int of a runtime
EXEC_TIMEOUT = 600  # seconds, the least: that of the vendor's own training scripts


class Variable(NamedTuple):
    """A variable and why it is given.

    value: for a recipe; None where it needs none. lasts: what reads it does so once in a process. shared: the
    variable is a folder, which goes by this name in `compile_cache.shared`.
    """

    name: str
    value: Callable[[Recipe], str | None]
    why: str
    lasts: bool = False
    shared: str | None = None


class Stale(NamedTuple):
    """A variable that does nothing. since: the release of Neuron; why, and what does now what it did.

    word: in the variable, which is read for others; None for the whole of it.
    """

    name: str
    since: str
    why: str
    word: str | None = None


def _exec_timeout(recipe: Recipe) -> str:
    return str(max(EXEC_TIMEOUT, math.ceil(recipe.resilience.start_up_s)))


def _on_several_nodes(value: str) -> Callable[[Recipe], str | None]:
    def given(_recipe: Recipe) -> str | None:
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        return value if ranks > int(os.environ.get("LOCAL_WORLD_SIZE", ranks)) else None

    return given


def _rounds(recipe: Recipe) -> str | None:
    return "1" if recipe.precision.rounding == "hardware" else None


def _rounding_seed(recipe: Recipe) -> str | None:
    return str(recipe.seed % (1 << SEED_BITS)) if _rounds(recipe) else None


def _expandable(_recipe: Recipe) -> str | None:
    return None if "PYTORCH_CUDA_ALLOC_CONF" in os.environ else "expandable_segments:True"  # its earlier name


def _local(part: str) -> Callable[[Recipe], str]:
    """`part` of the node's own folder, whose place is one of the node's disk's unless the recipe names it."""

    def given(recipe: Recipe) -> str:
        named = recipe.compile_cache.dir
        return str((own_folder() / "compiled" if named is None else _path(named)) / part)

    return given


def _if_named(part: str) -> Callable[[Recipe], str | None]:
    """The same, where the recipe says anything of graphs; else the library has a place of its own."""

    def given(recipe: Recipe) -> str | None:
        cache = recipe.compile_cache
        return None if cache.dir is None and cache.shared is None else _local(part)(recipe)

    return given


def _path(folder: str) -> Path:
    return Path(folder).expanduser().absolute()


# Both are the fallback of torch.compile: what it makes is the same on a CPU and a GPU.
INDUCTOR = (
    Variable(
        "TORCHINDUCTOR_CACHE_DIR",
        _if_named("inductor"),
        "compiled graphs go where compile_cache.dir says",
        shared="inductor",
    ),
    Variable("TRITON_CACHE_DIR", _if_named("triton"), "and so do compiled kernels", shared="triton"),
)

PRESETS: dict[str, tuple[Variable, ...]] = {
    "cpu": INDUCTOR,
    "cuda": (
        Variable(
            "PYTORCH_ALLOC_CONF",
            _expandable,
            "weights that come and go beside activations leave holes that fit nothing: memory that is taken "
            "and can't be had",
        ),
        *INDUCTOR,
    ),
    "neuron": (
        Variable(
            "NEURON_RT_EXEC_TIMEOUT",
            _exec_timeout,
            "the runtime ends a graph after 30 s, also one that only waits for a rank which still compiles; "
            "the watchdog judges that, and knows which rank it is",
        ),
        Variable("FI_PROVIDER", _on_several_nodes("efa"), "collectives between nodes go over EFA"),
        Variable(
            "FI_EFA_USE_DEVICE_RDMA",
            _on_several_nodes("1"),
            "and straight between the devices' memories, not by way of the hosts'",
        ),
        Variable(
            ROUNDS,
            _rounds,
            "precision.rounding=hardware; the runtime reads it when it loads a graph",
            lasts=True,
        ),
        Variable("NEURON_RT_STOCHASTIC_ROUNDING_SEED", _rounding_seed, "from the recipe's seed", lasts=True),
        Variable(
            "TORCH_NEURONX_NEFF_CACHE_DIR",
            _local("graphs"),
            "compiled graphs are read from the node's own disk: thousands of ranks that start would wait for a "
            "shared one",
            shared="graphs",
        ),
        Variable("TORCH_NEURONX_NEFF_LOCAL_CACHE_DIR", _local("locks"), "the locks of those who compile them"),
        Variable("NKI_COMPILE_CACHE_URL", _local("nki"), "likewise for kernels in NKI", shared="nki"),
    ),
}

_XLA = "only torch-xla read it, and Neuron trains with that no more"

STALE: dict[str, tuple[Stale, ...]] = {
    "cpu": (),
    "cuda": (),
    "neuron": (
        Stale(
            "NEURON_RT_ASYNC_EXEC_MAX_INFLIGHT_REQUESTS", "2.31", "the device runs beside the host without it"
        ),
        Stale("NEURON_COMPILE_CACHE_URL", "2.30", f"{_XLA}; use compile_cache.shared"),
        Stale("XLA_USE_BF16", "2.30", f"{_XLA}; use precision=bf16_sr"),
        Stale("XLA_DOWNCAST_BF16", "2.30", f"{_XLA}; use precision=bf16_sr"),
        *(
            Stale(name, "2.30", _XLA)
            for name in (
                "NEURON_FUSE_SOFTMAX",
                "NEURON_CUSTOM_SILU",
                "NEURON_EXTRACT_GRAPHS_ONLY",
                "NEURON_EXPERIMENTAL_COMPRESS_RG",
                "ALLREDUCE_GRADIENTS_BUCKET_SIZE_MB",
                "XLA_DISABLE_FUNCTIONALIZATION",
                "XLA_USE_DUMMY_STORE",
                "TORCH_DIST_INIT_BARRIER",
                "BUCKET_CAP_MB",
            )
        ),
        *(
            Stale("NEURON_CC_FLAGS", "2.30", f"{_XLA}; use compile_cache.dir", word)
            for word in ("--cache_dir", "--no_cache", "--retry_failed_compilation")
        ),
    ),
}
