"""Initial values: each element a function of (seed, separate weight's name, row, column).

So every layout starts from the same numbers, and so do coalesced and separate projections.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from trainwright.configs.projections import ADDED
from trainwright.configs.schema import ModelConfig
from trainwright.models.counter_random import key_of, normal
from trainwright.models.decoder import decoder
from trainwright.models.storage import Piece, stored_weights

ELEMENTS_AT_ONCE = 1 << 20  # drawn at a time, which bounds the int32 scratch memory


@torch.no_grad()
def init_weights(pieces: Mapping[str, Piece], config: ModelConfig, seed: int) -> None:
    """Fill `pieces` in place: norms with 1, matrices with N(0, `deviation`).

    pieces: by the stored parameter's name, the part of it that is here; of a part of the model only its own.
    """
    stored = dict(stored_weights(config))
    for stored_name, piece in pieces.items():
        if piece.values.dim() == 1:
            piece.values.fill_(1.0)
            continue
        for name, rows, expert in stored[stored_name]:
            part = piece.of(expert)
            if part is not None:
                _fill(part, rows, key_of(seed, name), deviation(name, config))


def deviation(name: str, config: ModelConfig) -> float:
    """The standard deviation of the matrix `name`: initializer_range, as the reference has it.

    With `scaled_init` the projections of a layer whose results are added to the residual stream have
    initializer_range / sqrt(2 layers), so that the stream's variance doesn't grow with the depth (GPT-2;
    Megatron-LM, arXiv 1909.08053).
    """
    scaled = config.scaled_init and name.split(".")[-2] in ADDED
    return config.initializer_range / (math.sqrt(2 * config.num_hidden_layers) if scaled else 1.0)


def initial_norm(config: ModelConfig) -> float:
    """The L2 norm of all initial weights to expect: the root of the sum of elements times variance.

    A norm's gains are 1 each. The drawn weights' own differs by about 1 / sqrt(2 elements) of it.
    """
    with torch.device("meta"):
        model = decoder(config)
    squares = (
        weight.numel() * (1.0 if weight.dim() == 1 else deviation(name, config) ** 2)
        for name, weight in model.named_parameters()
    )
    return math.sqrt(sum(squares))


def _fill(piece: Piece, stored_rows: Tensor | None, key: int, std: float) -> None:
    """Draw the elements of a separate weight that lie in `piece`."""
    values, device = piece.values, piece.values.device
    width = values.shape[1]
    columns = torch.arange(piece.column, piece.column + width, dtype=torch.int32, device=device)
    own, here = (rows.to(device) for rows in piece.rows_of(stored_rows))
    step = max(1, ELEMENTS_AT_ONCE // max(1, width))
    for start in range(0, len(own), step):
        drawn = normal(key, own[start : start + step].to(torch.int32), columns)
        values[here[start : start + step]] = drawn.mul_(std).to(values.dtype)
