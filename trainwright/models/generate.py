"""Greedy and sampled decoding with a KV cache."""

import torch
from torch import Tensor

from trainwright.models.kv_cache import LayerCache
from trainwright.models.llama import Llama


@torch.no_grad()
def generate(
    model: Llama,
    prompt: Tensor,
    new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    stop: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continue `prompt` (batch, length) by up to `new_tokens`: (batch, length + new).

    temperature 0 takes the likeliest token; above it tokens are sampled from the `top_k` likeliest and
    from the smallest set whose probability reaches `top_p` (nucleus sampling, arXiv 1904.09751). A
    sequence that has given `stop` goes on with `stop`; decoding ends when all have.
    """
    cache = [LayerCache(prompt.shape[1] + new_tokens) for _ in model.layers]
    tokens, fresh = prompt, prompt
    done = torch.zeros(len(prompt), 1, dtype=torch.bool, device=prompt.device)
    for _ in range(new_tokens):
        logits = model(fresh, cache=cache)[:, -1].float()
        fresh = _choose(logits, temperature, top_k, top_p, generator)
        if stop is not None:
            fresh = torch.where(done, stop, fresh)
            done |= fresh == stop
        tokens = torch.cat((tokens, fresh), dim=1)
        if stop is not None and bool(done.all()):
            break
    return tokens


def _choose(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float, generator: torch.Generator | None
) -> Tensor:
    """One token for each row of `logits` (batch, vocabulary): (batch, 1)."""
    if temperature == 0.0:
        return logits.argmax(-1, keepdim=True)
    probabilities, order = torch.softmax(logits / temperature, -1).sort(-1, descending=True)
    if top_k is not None:
        probabilities[:, top_k:] = 0.0
    before = probabilities.cumsum(-1) - probabilities
    probabilities[before >= top_p] = 0.0
    drawn = torch.multinomial(probabilities, 1, generator=generator)
    return order.gather(-1, drawn)
