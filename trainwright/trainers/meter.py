"""How fast a step was, for its line of metrics.jsonl."""

from dataclasses import dataclass

from trainwright.trainers.observers.base import Metrics
from trainwright.trainers.parallel.ranks import Ranks
from trainwright.trainers.platform.base import Platform


@dataclass(frozen=True)
class Meter:
    """flops_per_token: of the training. peak_flops: of a device; without it `mfu` isn't told."""

    platform: Platform
    ranks: Ranks
    flops_per_token: float
    peak_flops: float | None

    def speed(self, target_tokens: int, step_time: float, data_time: float) -> Metrics:
        """Of a step over all ranks; times in seconds."""
        rate = target_tokens / step_time
        metrics: Metrics = {
            "tokens_per_s": rate,
            "step_time_s": step_time,
            "data_time_s": data_time,
            "memory_gib": self.platform.memory_gib(),
        }
        if self.peak_flops is not None:
            metrics["mfu"] = rate * self.flops_per_token / (self.peak_flops * self.ranks.size)
        return metrics
