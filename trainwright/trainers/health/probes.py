"""Small questions to a device whose answers trainwright relies on, or whose failure users should know of.

They ask for no device by name: on a CPU they hold, and are quick. Of a device that nobody has trained on yet
they say what to expect.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from trainwright.configs.schema import ModelConfig, Recipe, TrainConfig
from trainwright.models.counter_random import key_of, normal, random_bits
from trainwright.trainers.build import build_stepper
from trainwright.trainers.data.batch import Batch
from trainwright.trainers.parallel.ranks import Ranks
from trainwright.trainers.platform.base import Platform
from trainwright.trainers.platform.cpu import Cpu
from trainwright.trainers.platform.device_errors import Asks, known_in
from trainwright.trainers.steppers.updating import sum_of_squares
from trainwright.trainers.tasks.pretrain import Pretraining

T = TypeVar("T")

OK, FAILED, NONE = "ok", "failed", "none"

START, ADDED, TIMES = 1024.0, 0.5, 2048  # in fp16 nearest stays at the start: half of the last bit, and a tie
ROWS, COLUMNS = 512, 384
NORM_ERROR = 1e-5  # relative; fp32 sums of rows are within 1e-6
PARITY_ERROR = 1e-3  # relative, of fp32 numbers that went through two layers, their gradients, and an update
WORDS, LENGTH, SEQUENCES = 128, 64, 4


class Finding(NamedTuple):
    """What a rank found. verdict: OK, FAILED, or NONE where there was nothing to ask."""

    verdict: str
    found: str


class Outcome(NamedTuple):
    """What all ranks found. found: the first failing rank's words, else rank 0's. ranks: those that failed."""

    probe: str
    verdict: str
    found: str
    ranks: tuple[int, ...]
    touches: str
    of_the_node: bool


class Probe(NamedTuple):
    """A question. touches: what a failure means, and what to do. of_the_node: it is the node's fault.

    ask: what a rank does by itself, and gives the answer, or what all ranks do together to find it.
    """

    name: str
    ask: Callable[[Recipe, Ranks, Platform], Finding | Callable[[], Finding]]
    touches: str
    of_the_node: bool = False


def probe_all(recipe: Recipe, ranks: Ranks, platform: Platform) -> list[Outcome]:
    """Ask all; all ranks call it.

    Raises:
        RunFailed, BadRequest, NumericalFailure: a device fails in a way that is no answer, and no node's fault.
    """
    return [_outcome(probe, recipe, ranks, platform) for probe in PROBES]


def _outcome(probe: Probe, recipe: Recipe, ranks: Ranks, platform: Platform) -> Outcome:
    mine = _answer(probe, platform, lambda: probe.ask(recipe, ranks, platform))
    # Who waits in a collective for a rank that couldn't come to it waits for ever.
    together = all(ranks.gather(not isinstance(mine, Finding)))
    if not isinstance(mine, Finding):
        mine = _answer(probe, platform, mine) if together else Finding(NONE, "another rank couldn't begin")
    all_found: list[Finding] = ranks.gather(mine)
    failed = tuple(rank for rank, one in enumerate(all_found) if one.verdict == FAILED)
    verdict, found = all_found[failed[0] if failed else 0]
    return Outcome(probe.name, verdict, found, failed, probe.touches, probe.of_the_node)


def _answer(probe: Probe, platform: Platform, ask: Callable[[], T]) -> T | Finding:
    """What `ask` gives; a device that can't do what it is asked has answered, too."""
    try:
        return ask()
    except RuntimeError as error:
        known = known_in(str(error), platform.failures)
        asked_for = known and known.asks is Asks.NUMBERS and not probe.of_the_node  # a probe may bring a NaN
        if known and not known.of_the_node and not asked_for:
            raise known.error(str(error), worked=False) from error
        return Finding(FAILED, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")


def _rounding(recipe: Recipe, _ranks: Ranks, platform: Platform) -> Finding:
    """Whether sums in fp16 are rounded as the recipe says: what is too small to add stays away, or adds up."""
    numbers = torch.full((64,), START, dtype=torch.float16, device=platform.device)
    for _ in range(TIMES):
        numbers = numbers + ADDED
    came_to = float(numbers.cpu().float().mean())
    stochastic = came_to > 1.5 * START
    how = "stochastically" if stochastic else "to nearest"
    verdict = OK if stochastic == (recipe.precision.rounding == "hardware") else FAILED
    return Finding(verdict, f"{START:.0f} and {TIMES} times {ADDED} make {came_to:.0f}: rounded {how}")


def _norm_2d(_recipe: Recipe, ranks: Ranks, platform: Platform) -> Finding | Callable[[], Finding]:
    """Whether the norm of a matrix is right, and that of one whose blocks lie on a mesh of ranks."""
    rows, columns = torch.arange(ROWS), torch.arange(COLUMNS)
    matrix = normal(key_of("norm"), rows, columns)
    exact = float(matrix.double().square().sum().sqrt())
    whole = float(sum_of_squares([matrix.to(platform.device)], platform.device).sqrt()) / exact - 1
    if ranks.size == 1:
        return _within_error({"whole": whole})
    shape = (2, ranks.size // 2) if ranks.size % 2 == 0 else (1, ranks.size)
    row, column = divmod(ranks.rank, shape[1])
    block = matrix.tensor_split(shape[0])[row].tensor_split(shape[1], dim=1)[column].contiguous()
    square = sum_of_squares([block.to(platform.device)], platform.device).reshape(1)

    def on_a_mesh() -> Finding:
        mesh = init_device_mesh(platform.device.type, shape, mesh_dim_names=("rows", "columns"))
        for axis in ("rows", "columns"):
            dist.all_reduce(square, group=mesh[axis].get_group())
        return _within_error({"whole": whole, "mesh": float(square.sqrt()) / exact - 1})

    return on_a_mesh


def _within_error(errors: dict[str, float]) -> Finding:
    right = all(abs(error) < NORM_ERROR for error in errors.values())
    said = " ".join(f"{key} off by {error:.1e}" for key, error in errors.items())
    return Finding(OK if right else FAILED, said)


class _Untaught(Pretraining):
    """The task without its data, so without a tokenizer."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.ranks = Ranks()


def _parity(_recipe: Recipe, _ranks: Ranks, platform: Platform) -> Finding:
    """Whether a step of a small model gives what it gives on the CPU: loss, gradients, and the next loss."""
    here, there = _step(platform), _step(Cpu())
    errors = [one / other - 1 for one, other in zip(here, there, strict=True)]
    right = all(abs(error) < PARITY_ERROR for error in errors)
    said = (
        f"{name} {one:.6g} off by {error:.1e}"
        for name, one, error in zip(("loss", "grad_norm", "next_loss"), here, errors, strict=True)
    )
    return Finding(OK if right else FAILED, " ".join(said))


def _step(platform: Platform) -> tuple[float, float, float]:
    """Loss, gradient norm and the loss after the update, of a step of one rank in fp32."""
    model = ModelConfig(
        vocab_size=WORDS, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4
    )
    train = TrainConfig(seq_len=LENGTH, global_batch_size=SEQUENCES, micro_batch_size=SEQUENCES // 2)
    recipe = Recipe(model=model, train=train)
    stepper, _ = build_stepper(recipe, _Untaught(recipe), Ranks(), platform, None)
    batch, count = _batch(), SEQUENCES * LENGTH
    loss = stepper.forward_backward(batch, count)
    grad_norm = stepper.squares()[0].sqrt()
    stepper.update(recipe.optim.lr, grad_norm, recipe.optim.clip)
    after = stepper.evaluate(batch) / count
    return float(loss / count), float(grad_norm), float(after)


def _batch() -> Batch:
    """Sequences of random words in two documents each."""
    words = random_bits(key_of("parity"), torch.arange(SEQUENCES), torch.arange(LENGTH + 1)) % WORDS
    tokens: Tensor = words.long()
    documents = (torch.arange(LENGTH) >= LENGTH // 2).to(torch.int32).expand(SEQUENCES, LENGTH).contiguous()
    return Batch(tokens[:, :-1], tokens[:, 1:], documents, np.zeros((SEQUENCES, 1), np.int64), 0.0)


def _inf_all_reduce(_recipe: Recipe, ranks: Ranks, platform: Platform) -> Finding | Callable[[], Finding]:
    """Whether one rank's infinities and NaN are still such in a sum of all ranks."""
    if ranks.size == 1:
        return Finding(NONE, "one process")
    special = [float("inf"), float("-inf"), float("nan"), 1.0] if ranks.first else [1.0] * 4
    mine = torch.tensor(special, device=platform.device)

    def summed() -> Finding:
        total = ranks.sum(mine).cpu()
        kept = bool(total[0] == float("inf") and total[1] == -float("inf") and total[2].isnan())
        verdict = OK if kept and float(total[3]) == ranks.size else FAILED
        return Finding(verdict, " ".join(f"{number:.3g}" for number in total.tolist()))

    return summed


# In this order: what a NaN does to a device may last until the process ends.
PROBES = (
    Probe(
        "stochastic_rounding",
        _rounding,
        "precision.rounding=hardware relies on it, and no other recipe wants it: use precision.rounding="
        "optimizer, and unset NEURON_RT_STOCHASTIC_ROUNDING_EN",
    ),
    Probe(
        "norm_2d",
        _norm_2d,
        "clipping and the stability monitor rely on it: another release of the "
        "device's software, or optim.clip=null",
    ),
    Probe(
        "parity",
        _parity,
        "everything that is trained here: another node, or another release of the device's software",
        of_the_node=True,
    ),
    Probe(
        "inf_all_reduce",
        _inf_all_reduce,
        "a loss or a norm that isn't finite is told by a flag of its own, so training is safe; a sum of "
        "gradients may hide one rank's Inf: heed the stability monitor's spikes",
    ),
)
