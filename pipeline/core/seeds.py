"""Seeds and random numbers that are a pure function of what they are for, the same in every process.

torch.manual_seed(hash64("dropout", seed, step))
random_of("crop", seed, key).random()
"""

from __future__ import annotations

import hashlib
import random


def hash64(*parts: object) -> int:
    """An integer in [0, 2^64): the first 8 bytes, big-endian, of the SHA-256 of the parts' `str`, joined by "/"."""
    text = "/".join(map(str, parts))
    # Surrogates stand for bytes of a key that were not UTF-8.
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")


def hash63(*parts: object) -> int:
    """The lower 63 bits of `hash64`: a seed for torch's generators, and a number for its int64 tensors."""
    return hash64(*parts) & (2**63 - 1)


def random_of(*parts: object) -> random.Random:
    """A generator of random numbers, seeded with `hash64` of the parts."""
    return random.Random(hash64(*parts))
