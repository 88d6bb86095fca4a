"""Initial values: each element a function of (seed, separate weight's name, row, column).

So every layout starts from the same numbers, and so do coalesced and separate projections.
"""

import torch
from torch import Tensor, nn

from trainwright.configs.schema import ModelConfig
from trainwright.models.counter_random import key_of, normal
from trainwright.models.storage import stored_weights

ROWS_AT_ONCE = 1 << 20  # elements drawn at a time, which bounds the int32 scratch memory


@torch.no_grad()
def init_weights(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fill `model` in place: norms with 1, matrices with N(0, initializer_range) as the reference does."""
    for stored_name, separate in stored_weights(config):
        parameter = model.get_parameter(stored_name)
        if parameter.dim() == 1:
            parameter.fill_(1.0)
            continue
        for name, rows in separate:
            key = key_of(seed, name)
            stored_rows = torch.arange(parameter.shape[0]) if rows is None else rows
            _fill(parameter, stored_rows, key, config.initializer_range)


def _fill(parameter: Tensor, stored_rows: Tensor, key: int, std: float) -> None:
    columns = torch.arange(parameter.shape[1], dtype=torch.int32, device=parameter.device)
    step = max(1, ROWS_AT_ONCE // parameter.shape[1])
    for start in range(0, len(stored_rows), step):
        target = stored_rows[start : start + step].to(parameter.device)
        own_rows = torch.arange(start, start + len(target), dtype=torch.int32, device=parameter.device)
        parameter[target] = normal(key, own_rows, columns).mul_(std).to(parameter.dtype)
