"""The task of language-model pretraining: next-token prediction over packed documents."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trainwright.configs.schema import Recipe
from trainwright.models.attention import KERNELS
from trainwright.models.decoder import decoder, decoder_plan
from trainwright.models.generate import generate
from trainwright.models.hf import load_hf, write_to
from trainwright.models.init import init_weights
from trainwright.models.llama_plan import llama_units
from trainwright.models.plan import Plan, Units
from trainwright.models.storage import Piece
from trainwright.trainers.checkpoint.load import read_state
from trainwright.trainers.checkpoint.place import Place
from trainwright.trainers.data.batch import Batch
from trainwright.trainers.data.shared import (
    load_shared_tokenizer,
    open_shared_stream,
    open_shared_validation,
    shared_horizon,
)
from trainwright.trainers.parallel.ranks import Ranks
from trainwright.trainers.platform.base import Platform
from trainwright.trainers.recompute import recompute_activations


class Pretraining:
    """A Llama or a Mixtral on a stream of text; implements `Task`."""

    def __init__(self, recipe: Recipe, ranks: Ranks) -> None:
        self.recipe = recipe
        self.ranks = ranks
        self.tokenizer = load_shared_tokenizer(recipe, ranks)

    def build_model(self, platform: Platform, layers: range | None = None) -> nn.Module:
        """See `Task`."""
        with torch.device("meta"):
            config = self.recipe.model
            model = decoder(config, KERNELS[platform.attention](config.sliding_window), layers)
        train = self.recipe.train
        recompute_activations(model.layers, train.activation_checkpointing, train.recompute_keep)
        if train.compile:
            dynamic = None if platform.compiles_any_shape else False
            for layer in model.layers:
                layer.compile(backend=platform.compile_backend, dynamic=dynamic)
        return model

    def plan(self) -> tuple[Plan, Units]:
        """See `Task`."""
        return decoder_plan(self.recipe.model), llama_units(self.recipe.model)

    def fill(self, pieces: Mapping[str, Piece]) -> None:
        """See `Task`."""
        config = self.recipe.model
        if config.pretrained is None:
            init_weights(pieces, config, self.recipe.seed)
        else:
            load_hf(Path(config.pretrained).expanduser(), config, write_to(pieces))

    def open_stream(self, cursor: np.ndarray | None) -> AbstractContextManager[Iterator[Batch]]:
        """See `Task`."""
        return open_shared_stream(self.recipe, self.tokenizer, self.ranks, cursor)

    def open_validation(self) -> list[Batch] | None:
        """See `Task`."""
        return open_shared_validation(self.recipe, self.tokenizer, self.ranks)

    def total_steps(self) -> int | None:
        """See `Task`."""
        return self.recipe.train.steps or shared_horizon(self.recipe, self.tokenizer, self.ranks)

    def loss(self, model: nn.Module, batch: Batch, hidden: Tensor | None = None) -> Tensor:
        """See `Task`."""
        documents = batch.documents if self.recipe.data.document_mask else None
        loss: Tensor = model(batch.tokens, documents, batch.targets, hidden=hidden)
        return loss

    def sample(self, checkpoint: Place) -> dict[str, Any] | None:
        """See `Task`; read back from the checkpoint, so that it is the same from any layout.

        On the CPU: the device may have no room for a whole model beside this rank's part of it.
        """
        prompt = self.recipe.monitor.sample_prompt
        if prompt is None:
            return None
        model = decoder(self.recipe.model)
        read_state(checkpoint, {"model": dict(model.named_parameters())}, alone=True)
        words = self.tokenizer.encode(prompt).tolist() or [self.tokenizer.eos]  # what a new document follows
        ids = torch.tensor([words])
        generator = torch.Generator().manual_seed(self.recipe.seed)
        written = generate(
            model,
            ids,
            self.recipe.monitor.sample_tokens,
            temperature=0.8,
            top_p=0.95,
            stop=self.tokenizer.eos,
            generator=generator,
        )
        return {"prompt": prompt, "text": self.tokenizer.decode(written[0, ids.shape[1] :].tolist())}
