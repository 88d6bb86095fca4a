"""What a rank finds out about its own device: whether it computes right, and whether its memory holds."""

import hashlib
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from trainwright.models.counter_random import key_of, random_bits
from trainwright.trainers.platform.base import Platform

REPEATS = 3  # of each product: an unstable device differs from itself
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CHUNK = 1 << 24  # numbers that are compared at once
PATTERNS = (0x55555555, -0x55555556)  # every bit is once 1 and once 0

Answers = dict[str, tuple[str, ...]]  # by dtype, a digest of each repeat's bits


def products(platform: Platform) -> Answers:
    """Digests of known products, which ranks on devices of one kind can compare."""
    numbers = torch.arange(platform.product_size)
    # From counters on the CPU, so that every rank has the same; 24 random bits fill fp32's mantissa.
    matrix = random_bits(key_of("health"), numbers, numbers).float() * 2.0**-31
    return {
        name: tuple(_digest(platform.product(matrix.to(dtype))) for _ in range(REPEATS))
        for name, dtype in DTYPES.items()
    }


def _digest(product: Tensor) -> str:
    bits = product.contiguous().view(torch.uint8).numpy().tobytes()
    return hashlib.blake2b(bits, digest_size=8).hexdigest()


def wrong_products(answers: Sequence[Answers], kinds: Sequence[str]) -> dict[int, str]:
    """The ranks whose device computes wrong, each with what it does, in words that follow "rank 3".

    answers, kinds: by rank. A device that differs from itself is wrong without a comparison. Of the others of
    one kind the majority is right; where there is none, all are named, for one of them must be wrong.
    """
    wrong = {}
    for rank, answer in enumerate(answers):
        if unstable := [name for name, digests in answer.items() if len(set(digests)) > 1]:
            wrong[rank] = f"computes another product each time in {' and '.join(unstable)}"
    for kind in set(kinds):
        peers = [rank for rank, its in enumerate(kinds) if its == kind and answers[rank] and rank not in wrong]
        for name in DTYPES:
            votes = Counter(answers[rank][name][0] for rank in peers)
            right, agreeing = votes.most_common(1)[0] if votes else ("", 0)
            tied = 2 * agreeing <= len(peers)
            for rank in peers:
                if len(votes) > 1 and (tied or answers[rank][name][0] != right):
                    others = "which has no majority" if tied else f"against {agreeing} ranks that agree"
                    wrong.setdefault(rank, f"computes a product of other bits in {name}, {others}")
    return wrong


def memory_fault(platform: Platform, gib: float, free: int) -> str | None:
    """Have `gib` GiB for a moment, write and read them; what is wrong, in words that follow "rank 3".

    free: the bytes that this rank may take at most.
    """
    size = int(gib * 2**30)
    if size > free:
        return f"has {free / 2**30:.1f} GiB of free memory, and health.memory_gib={gib}"
    try:
        holds = _holds(platform.allocate(size)) if size >= 4 else True
    except (RuntimeError, MemoryError, OSError) as error:
        return f"can't have {gib} GiB of memory ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    finally:
        platform.give_back()
    return None if holds else f"reads other bits from its memory than it wrote, in {gib} GiB"


def _holds(memory: Tensor) -> bool:
    for pattern in PATTERNS:
        memory.fill_(pattern)
        for chunk in memory.split(CHUNK):
            if not bool((chunk == pattern).all()):
                return False
    return True
