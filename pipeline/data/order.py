"""The order of samples: a pure function of (seed, epoch, position), with no state and next to no memory.

`permute` is a bijection of range(n) that is computed, not stored: a Feistel network over the smallest power of four
that holds n, walked until it falls below n again (Black & Rogaway 2002, "Ciphers with arbitrary finite domains",
section 3). `ShardOrder` makes of it an order that is kind to storage: see there.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

CANONICAL_STREAMS = 64
_ROUNDS = 8
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: its multiples are far apart
_ROUND_KEYS = np.arange(_ROUNDS, dtype=np.uint64) * _GOLDEN

# Of one epoch: shards in order, where each of them ends in the row, the key that permutes its samples.
_Epoch = tuple[Ints, Ints, NDArray[np.uint64]]


def key_of(*parts: object) -> int:
    """64 bits that are a pure function of `parts`."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:8], "big")


def permute(index: Ints, size: int | Ints, key: int | NDArray[np.uint64]) -> Ints:
    """The image of each `index` under a pseudo-random bijection of range(size), chosen by `key`.

    Args:
        index: int64 [n], 0 <= index < size.
        size: one for all, or int64 [n].
        key: one for all, or uint64 [n].
    """
    value = np.array(index, dtype=np.uint64)
    sizes = np.broadcast_to(np.asarray(size, dtype=np.uint64), value.shape)
    keys = np.broadcast_to(np.asarray(key, dtype=np.uint64), value.shape)
    half_bits = np.maximum(1, np.ceil(np.log2(np.maximum(sizes, 2).astype(np.float64)) / 2)).astype(np.uint64)
    # log2 in floating point may fall short by one just below a power of four.
    half_bits += ((np.uint64(1) << (half_bits * np.uint64(2))) < sizes).astype(np.uint64)
    outside = np.arange(len(value))
    while len(outside):
        value[outside] = _feistel(value[outside], half_bits[outside], keys[outside])
        outside = outside[value[outside] >= sizes[outside]]
    return value.astype(np.int64)


def _feistel(value: NDArray[np.uint64], half_bits: NDArray[np.uint64], keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = value >> half_bits, value & mask
    for number in range(_ROUNDS):
        left, right = right, left ^ (_mix(right ^ (keys + _ROUND_KEYS[number])) & mask)
    return (left << half_bits) | right


def _mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of SplitMix64 (Steele, Lea & Flood 2014): every input bit changes every output bit."""
    value = value + _GOLDEN
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


class ShardOrder:
    """Which sample of which shard stands at a position, when reading should stay close together.

    In each epoch the shards are permuted and laid end to end, the samples of each permuted within it. That row of N
    samples is cut into `streams` equal runs, the canonical streams (they differ by one sample at most, however
    uneven the shards are), and the epoch takes one sample of each stream in turn. So a batch mixes `streams` shards,
    each stream has one shard open at a time, every sample comes once an epoch, and nothing of it depends on how
    many ranks or workers read.
    """

    def __init__(self, counts: list[int], seed: int, streams: int = CANONICAL_STREAMS) -> None:
        """`counts`: samples of each shard, in the fixed order of shards."""
        self.counts = np.array(counts, dtype=np.int64)
        self.samples = int(self.counts.sum())
        self.seed = seed
        self.streams = streams
        self._latest: tuple[int, _Epoch] | None = None

    def locate(self, positions: Ints) -> tuple[Ints, Ints]:
        """(shard, row in the shard), int64 [n] each, of positions counted from the start of training."""
        epochs, within = np.divmod(np.asarray(positions, dtype=np.int64), self.samples)
        shards, rows = np.empty_like(within), np.empty_like(within)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            shards[here], rows[here] = self._locate_in_epoch(epoch, within[here])
        return shards, rows

    def _locate_in_epoch(self, epoch: int, within: Ints) -> tuple[Ints, Ints]:
        shards, ends, keys = self._lay_out(epoch)
        turn, stream = np.divmod(within, self.streams)
        length, longer = divmod(self.samples, self.streams)
        place = stream * length + np.minimum(stream, longer) + turn
        slot = np.searchsorted(ends, place, side="right")
        shard = shards[slot]
        offset = place - (ends[slot] - self.counts[shard])
        return shard, permute(offset, self.counts[shard], keys[slot])

    def _lay_out(self, epoch: int) -> _Epoch:
        latest = self._latest
        if latest is not None and latest[0] == epoch:
            return latest[1]
        key = key_of("shards", self.seed, epoch)
        slots = np.arange(len(self.counts))
        shards = permute(slots, len(self.counts), key)
        row: _Epoch = (shards, np.cumsum(self.counts[shards]), _mix(np.uint64(key) ^ slots.astype(np.uint64)))
        # One assignment: threads that read different epochs at once each keep a consistent row.
        self._latest = (epoch, row)
        return row
