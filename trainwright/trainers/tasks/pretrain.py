"""The task of language-model pretraining: next-token prediction over packed documents."""

from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from trainwright.configs.schema import Recipe
from trainwright.models.attention import KERNELS
from trainwright.models.generate import generate
from trainwright.models.hf import load_hf, write_to
from trainwright.models.init import init_weights
from trainwright.models.llama import Llama
from trainwright.models.llama_plan import llama_plan
from trainwright.trainers.data.batch import Batch
from trainwright.trainers.data.horizon import horizon
from trainwright.trainers.data.stream import Stream, open_stream
from trainwright.trainers.data.tokenizer import load_tokenizer
from trainwright.trainers.data.validation import open_validation
from trainwright.trainers.parallel.plan import styles_of
from trainwright.trainers.platform.base import Platform
from trainwright.trainers.recompute import recompute_activations


class Pretraining:
    """A Llama on a stream of text; implements `Task`."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.tokenizer = load_tokenizer(recipe)

    def build_model(self, platform: Platform) -> nn.Module:
        """See `Task`."""
        config = self.recipe.model
        with torch.device(platform.device):
            model = Llama(config, KERNELS[platform.attention]())
        styles_of(model, llama_plan(config))  # a plan that has fallen behind its model is said here
        if config.pretrained is None:
            init_weights(model, config, self.recipe.seed)
        else:
            write = write_to(dict(model.named_parameters()))
            load_hf(Path(config.pretrained).expanduser(), config, write)
        recompute_activations(model.layers, self.recipe.train.activation_checkpointing)
        return model

    def open_stream(self, cursor: np.ndarray | None) -> Stream:
        """See `Task`."""
        return open_stream(self.recipe, self.tokenizer, cursor=cursor)

    def open_validation(self) -> list[Batch] | None:
        """See `Task`."""
        return open_validation(self.recipe, self.tokenizer)

    def total_steps(self) -> int | None:
        """See `Task`."""
        return self.recipe.train.steps or horizon(self.recipe, self.tokenizer)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """See `Task`."""
        documents = batch.documents if self.recipe.data.document_mask else None
        loss: Tensor = model(batch.tokens, documents, batch.targets)
        return loss

    def sample(self, model: nn.Module, device: torch.device) -> dict[str, Any] | None:
        """See `Task`."""
        prompt = self.recipe.monitor.sample_prompt
        if prompt is None:
            return None
        words = self.tokenizer.encode(prompt).tolist() or [self.tokenizer.eos]  # what a new document follows
        ids = torch.tensor([words], device=device)
        generator = torch.Generator(device).manual_seed(self.recipe.seed)
        written = generate(
            cast(Llama, model),
            ids,
            self.recipe.monitor.sample_tokens,
            temperature=0.8,
            top_p=0.95,
            stop=self.tokenizer.eos,
            generator=generator,
        )
        return {"prompt": prompt, "text": self.tokenizer.decode(written[0, ids.shape[1] :].tolist())}
