"""Whether a run's numbers are sound: numbers in, findings out.

In the words of the HLAT run (arXiv 2404.10630): each step's loss, L2 norm of all gradients and L2 norm of all
parameters are looked at. r is the running mean of the gradient norm over `window` steps. A step whose norm is
above r + `margin` spikes, and the spike is as long as it takes until the norm is back under.

Steps that spike stay out of r: they would raise the bar for those after them. Once a spike is persistent its
steps do enter r, so that a level that stays becomes the new one and the spike ends.
"""

import math
import statistics
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

from trainwright.configs.schema import StabilityConfig

ANSWERS = ("warn", "skip", "rollback", "stop")  # the weakest first
OF_A_BATCH = ("spike", "nonfinite")  # what the batch of the step may be to blame for
RESOLUTION = 1e-7  # a change of one digit in a float32 norm, relative: no pace is known any better
PACES, ENOUGH = 100, 5  # stretches of steps that the parameter norm's pace is held against: at most, at least


class RollBack(Exception):
    """The run has to go on from before step `began`, without the batches from there to step `step`."""

    def __init__(self, began: int, step: int, why: str) -> None:
        super().__init__(why)
        self.began, self.step = began, step


@dataclass
class Spike:
    """`length` steps from step `began` on; `height`: their highest norm; `mean`: r before, None if unknown."""

    began: int
    mean: float | None
    length: int = 0
    height: float = -math.inf

    def grow(self, grad_norm: float) -> None:
        """Take in another step; a norm that isn't a number has no height."""
        self.length += 1
        self.height = max(self.height, grad_norm)

    def event(self) -> dict[str, object]:
        """The fields of the event `spike`."""
        return {"step": self.began, "length": self.length, "height": self.height, "mean": self.mean}


class Finding(NamedTuple):
    """What was found, what is to be done about it, and the step in which it began."""

    kind: str
    answer: str
    began: int
    said: str


class Judgement(NamedTuple):
    """What a step's numbers say. ended: the spike that is over with this step."""

    findings: list[Finding]
    ended: Spike | None

    @property
    def worst(self) -> Finding | None:
        """The finding with the strongest answer."""
        return max(self.findings, key=lambda finding: ANSWERS.index(finding.answer), default=None)

    @property
    def skip(self) -> bool:
        """Whether the step's update is to be skipped."""
        return self.worst is not None and self.worst.answer == "skip"


class Monitor:
    """Looks at each step's numbers once, in order. All ranks have the same ones, and so judge alike.

    warmup_steps: those of the learning rate. rollbacks_left: so many may be asked for, then it is a stop.
    """

    def __init__(self, config: StabilityConfig, warmup_steps: int, rollbacks_left: int) -> None:
        self.config = config
        self.spike: Spike | None = None  # the one under way
        self._warmup_steps = warmup_steps
        self._rollbacks_left = rollbacks_left
        self._norms: deque[float] = deque(maxlen=config.window)  # what r is the mean of
        self._lowest = math.inf  # r since the warm-up
        self._risen = False
        self._param_norm: float | None = None  # of the step before, unless that spiked
        self._moves: list[float] = []  # of the parameter norm, in the stretch of steps under way
        self._paces: deque[float] = deque(maxlen=PACES)
        self._drifts = False

    @property
    def skips(self) -> bool:
        """Whether an update may have to be skipped, so that it waits for the step's numbers."""
        return "skip" in (self.config.on_spike, self.config.on_nonfinite)

    @property
    def suspect_from(self) -> int | None:
        """The step from which on checkpoints may have to go: where the spike under way began."""
        return self.spike.began if self.spike else None

    @property
    def mean(self) -> float | None:
        """r; None until `window` steps are in it."""
        return statistics.fmean(self._norms) if len(self._norms) == self.config.window else None

    def look(self, step: int, loss: float, grad_norm: float, param_norm: float) -> Judgement:
        """What the numbers of `step` say. `param_norm` is that of the weights which made the loss."""
        finite = all(map(math.isfinite, (loss, grad_norm, param_norm)))
        spikes = not finite or grad_norm > self._bound()
        ended = self._follow(step, grad_norm, spikes)
        lasts = self.spike is not None and self.spike.length > self.config.persistent
        if finite and (not spikes or lasts):
            self._norms.append(grad_norm)
        found = [
            self._nonfinite(step, loss, grad_norm, param_norm)
            if not finite
            else self._spiking(step, grad_norm),
            self._persists(step),
            self._rise(step),
            self._drift(step, param_norm, calm=not spikes),
        ]
        return Judgement([finding for finding in found if finding is not None], ended)

    def _bound(self) -> float:
        mean, config = self.mean, self.config
        if mean is None:
            return math.inf
        return mean + max(config.margin, (config.relative_margin or 0.0) * mean)

    def _follow(self, step: int, grad_norm: float, spikes: bool) -> Spike | None:
        """Begin, lengthen or end the spike; returns one that has ended."""
        if not spikes:
            ended, self.spike = self.spike, None
            return ended
        self.spike = self.spike or Spike(step, self.mean)
        self.spike.grow(grad_norm)
        return None

    def _finding(self, kind: str, answer: str, began: int, said: str) -> Finding:
        if answer == "rollback" and self._rollbacks_left <= 0:
            said = f"{said}, and the run has been rolled back stability.rollbacks={self.config.rollbacks} times"
            return Finding("rollbacks", "stop", began, said)
        return Finding(kind, answer, began, said)

    def _nonfinite(self, step: int, loss: float, grad_norm: float, param_norm: float) -> Finding:
        assert self.spike is not None
        answer, began = self.config.on_nonfinite, self.spike.began
        broken = not math.isfinite(param_norm)
        if broken:  # it was the update of the step before
            began = min(began, max(1, step - 1))
        if answer == "skip" and (broken or self.spike.length > self.config.persistent):
            answer = "stop"
        said = f"step {step} has loss {loss}, gradient norm {grad_norm} and parameter norm {param_norm}"
        return self._finding("nonfinite", answer, began, said)

    def _spiking(self, step: int, grad_norm: float) -> Finding | None:
        """A spike that is only to be told of is told of when it is over."""
        answer = self.config.on_spike
        # Skipped updates leave the weights as they are: if the spike lasts, it is not the batches.
        if self.spike is None or answer == "warn" or self.spike.length > self.config.persistent:
            return None
        said = f"step {step} has gradient norm {grad_norm:.4g} and the running mean was {self.spike.mean:.4g}"
        return self._finding("spike", answer, self.spike.began, said)

    def _persists(self, step: int) -> Finding | None:
        if self.spike is None or self.spike.length != self.config.persistent + 1:
            return None
        said = f"the gradient norm has spiked for {self.spike.length} steps up to step {step}"
        return self._finding("persistent", self.config.on_persistent, self.spike.began, said)

    def _rise(self, step: int) -> Finding | None:
        """The running mean is above `rise` times its lowest since the warm-up; found when it gets there."""
        mean = self.mean
        if mean is None or step <= self._warmup_steps + self.config.window:
            return None
        self._lowest = min(self._lowest, mean)
        before, self._risen = self._risen, mean > self.config.rise * self._lowest
        if before or not self._risen:
            return None
        said = f"the mean gradient norm is {mean:.4g} at step {step} and was {self._lowest:.4g} at its lowest"
        return self._finding("rise", self.config.on_rise, step, said)

    def _drift(self, step: int, param_norm: float, calm: bool) -> Finding | None:
        """The parameter norm's pace in the last stretch of `window` steps is above `drift` times the usual.

        Its pace is the mean of |relative change| a step, which doesn't come near zero where a growing norm
        begins to fall; the usual one is the median of the stretches before, and not below RESOLUTION. Steps
        of the warm-up don't count, nor do changes beside a spike, whose updates may have been skipped.
        """
        before, self._param_norm = self._param_norm, param_norm if calm else None
        if not before or not calm or step <= self._warmup_steps:
            return None
        self._moves.append(abs(param_norm / before - 1))
        if len(self._moves) < self.config.window:
            return None
        pace = statistics.fmean(self._moves)
        usual = max(RESOLUTION, statistics.median(self._paces or [math.inf]))
        enough = len(self._paces) >= ENOUGH
        self._moves.clear()
        self._paces.append(pace)
        already, self._drifts = self._drifts, enough and pace > self.config.drift * usual
        if already or not self._drifts:
            return None
        said = f"at step {step} the parameter norm moves by {pace:.3g} of itself a step, {usual:.3g} was usual"
        return self._finding("drift", self.config.on_drift, step, said)
