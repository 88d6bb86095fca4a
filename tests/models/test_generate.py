import pytest
import torch

from trainwright.models.generate import generate
from trainwright.models.llama import Llama


@pytest.fixture
def model(config, filled) -> Llama:
    return filled(config)


@pytest.fixture
def prompt(config) -> torch.Tensor:
    return torch.randint(config.vocab_size, (3, 7), generator=torch.Generator().manual_seed(4))


@torch.no_grad()
def greedy(model: Llama, tokens: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """Without a cache: the whole prefix again for each token."""
    for _ in range(new_tokens):
        tokens = torch.cat((tokens, model(tokens)[:, -1].argmax(-1, keepdim=True)), dim=1)
    return tokens


def test_the_cache_changes_nothing(model, prompt):
    # Beyond the 64 positions from which the scaled shape's angles are stretched.
    assert torch.equal(generate(model, prompt, 90), greedy(model, prompt, 90))


def test_each_sequence_of_a_batch_is_as_alone(model, prompt):
    together = generate(model, prompt, 20)
    for row in range(3):
        assert torch.equal(generate(model, prompt[row : row + 1], 20)[0], together[row])


def test_sampling_is_reproducible(model, prompt):
    def sampled(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return generate(model, prompt, 20, temperature=1.0, top_k=20, top_p=0.95, generator=generator)

    assert torch.equal(sampled(0), sampled(0))
    assert not torch.equal(sampled(0), sampled(1))
    assert torch.equal(sampled(0)[:, :7], prompt)


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}])
def test_the_narrowest_sampling_is_greedy(model, prompt, narrow):
    assert torch.equal(
        generate(model, prompt, 20, **{"temperature": 2.0} | narrow), generate(model, prompt, 20)
    )


def test_decoding_stops_when_every_sequence_has(model, prompt):
    free = generate(model, prompt, 30)
    stop = int(free[0, 10])
    ended = generate(model, prompt, 30, stop=stop)
    ends = [7 + (row[7:] == stop).nonzero().flatten().tolist()[0] if stop in row[7:] else 36 for row in free]
    assert ended.shape[1] == max(ends) + 1
    for row, end in enumerate(ends):
        assert torch.equal(ended[row, : end + 1], free[row, : end + 1])
        assert (ended[row, end + 1 :] == stop).all()
    alone = generate(model, prompt[:1], 30, stop=stop)
    assert alone.shape[1] == ends[0] + 1 <= 11


def test_no_new_tokens(model, prompt):
    assert torch.equal(generate(model, prompt, 0), prompt)


class Fixed:
    """A model without layers whose next token always has the same probabilities."""

    layers = ()
    probabilities = torch.tensor([0.05, 0.5, 0.15, 0.3])

    def __call__(self, tokens, cache):
        return self.probabilities.log().expand(*tokens.shape, -1)


@pytest.mark.parametrize(
    ("narrow", "kept"),
    [
        ({}, [0.05, 0.5, 0.15, 0.3]),
        ({"top_k": 2}, [0, 0.625, 0, 0.375]),
        ({"top_k": 99}, [0.05, 0.5, 0.15, 0.3]),
        ({"top_p": 0.75}, [0, 0.625, 0, 0.375]),  # 0.5 doesn't reach it and 0.8 does
        ({"top_p": 0.85}, [0, 0.5 / 0.95, 0.15 / 0.95, 0.3 / 0.95]),
        ({"top_p": 0.4}, [0, 1, 0, 0]),
        ({"top_k": 3, "top_p": 0.75}, [0, 0.625, 0, 0.375]),
        ({"temperature": 0.5}, [p**2 / (0.05**2 + 0.5**2 + 0.15**2 + 0.3**2) for p in Fixed.probabilities]),
    ],
)
def test_tokens_are_drawn_by_what_is_kept_of_their_probabilities(narrow, kept):
    draws, kept = 20_000, torch.as_tensor(kept)
    drawn = generate(
        Fixed(),
        torch.zeros(draws, 1, dtype=torch.int64),
        1,
        **{"temperature": 1.0} | narrow,
        generator=torch.Generator().manual_seed(0),
    )[:, 1]
    shares = torch.bincount(drawn, minlength=4) / draws
    assert (shares[kept == 0] == 0).all()
    assert ((shares - kept).abs() <= 5 * (kept * (1 - kept) / draws).sqrt()).all()
