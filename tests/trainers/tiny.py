"""A model and a batch that a test computes in milliseconds."""

import numpy as np
import torch

from trainwright.configs.compose import load_recipe
from trainwright.configs.schema import Recipe
from trainwright.trainers.data.batch import IGNORE, Batch

TINY = [
    "model.vocab_size=64",
    "data.tokenizer.vocab_size=64",
    "model.hidden_size=16",
    "model.intermediate_size=32",
    "model.num_hidden_layers=2",
    "train.global_batch_size=4",
    "train.micro_batch_size=2",
    "train.seq_len=16",
]


def tiny_recipe(*overrides: str) -> Recipe:
    return load_recipe([*TINY, *overrides])


def tiny_batch(seed: int = 0) -> Batch:
    """Four sequences that differ in how many targets they have."""
    words = torch.randint(0, 64, (4, 17), generator=torch.Generator().manual_seed(seed))
    targets = words[:, 1:].clone()
    targets[0, 3:] = IGNORE
    return Batch(words[:, :-1], targets, torch.zeros(4, 16, dtype=torch.int32), np.zeros((4, 1), np.int64), 0.0)
