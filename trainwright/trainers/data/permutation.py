"""A keyed permutation that is computed, not stored.

A Feistel network over the residues (a, b) of a near-square domain just above n, whose few surplus values
are walked along their cycle back into range (Black and Rogaway, 2002, "Ciphers with arbitrary finite
domains"). Any position of any epoch is found in constant time and no memory.
"""

import hashlib
import math

import numpy as np

ROUNDS = 8


def key_of(*parts: object) -> int:
    """A 64-bit key from any parts that print unambiguously: numbers and names."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def permute(index: np.ndarray, n: int, key: int) -> np.ndarray:
    """Where each of `index` (int64, in 0..n-1) goes under the permutation of 0..n-1 that `key` names."""
    a = max(1, math.isqrt(n - 1) + 1)
    b = -(-n // a)
    keys = hash64(np.arange(ROUNDS, dtype=np.uint64) + np.uint64(key))
    out = _network(index.astype(np.uint64), np.uint64(a), np.uint64(b), keys)
    while (outside := out >= n).any():
        out[outside] = _network(out[outside], np.uint64(a), np.uint64(b), keys)
    return out.astype(np.int64)


def _network(value: np.ndarray, a: np.uint64, b: np.uint64, keys: np.ndarray) -> np.ndarray:
    high: np.ndarray = value // b
    low: np.ndarray = value % b
    for turn in range(0, ROUNDS, 2):
        high = (high + hash64(low ^ keys[turn]) % a) % a
        low = (low + hash64(high ^ keys[turn + 1]) % b) % b
    return np.asarray(high * b + low)


def hash64(value: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64: every bit of a uint64 reaches every bit of the result."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(value ^ (value >> np.uint64(31)))
