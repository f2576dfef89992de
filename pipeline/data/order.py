"""The orders of samples: pure functions of (seed, position), with no state and next to no memory.

    ShardOrder([1000, 1000, 731], seed=0).locate(positions)     # images: (sample, epoch); stays close together on disk
    GlobalOrder(2731, seed=0).locate(positions)                 # tokens: the same, shuffled over the whole split
    caption_in_epoch(0, samples, epochs, counts)                # which of its captions a sample has in an epoch

Both orders count positions from the start of training, samples from the start of the split, and go through every sample
once per epoch; of several sources with weights `mixture.py` takes turns between their orders. All is built of
`permute`: a bijection of range(n) that is computed, not stored. It is a Feistel network over the smallest power of four
that holds n, walked until it falls below n again (Black & Rogaway 2002, "Ciphers with arbitrary finite domains",
section 3).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.core.seeds import hash64

Ints = NDArray[np.int64]

CANONICAL_STREAMS = 64
_ROUNDS = 8
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: its multiples are far apart
_ROUND_KEYS = np.arange(_ROUNDS, dtype=np.uint64) * _GOLDEN

_TURN = np.uint64(0xD1B54A32D192ED03)  # another odd constant: the turns of a sample are far apart, too

# The layout of one epoch: shards in order, where each of them ends in the row, the key that permutes its samples.
_Layout = tuple[Ints, Ints, NDArray[np.uint64]]


def permute(index: Ints, size: int | Ints, key: int | NDArray[np.uint64]) -> Ints:
    """Where a pseudo-random bijection of range(size), chosen by `key`, sends each `index`: int64 [n].

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


def subset(count: int, size: int, key: int) -> Ints:
    """`count` of range(size), or all if there are no more: a choice that `key` fixes, in ascending order."""
    if count >= size:
        return np.arange(size)
    return np.sort(permute(np.arange(count), size, key))


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


def caption_in_epoch(seed: int, samples: Ints, epochs: Ints, counts: Ints) -> Ints:
    """Which of its `counts` captions each sample has in an epoch: int64 [n], 0 <= caption < counts.

    A sample with k captions has each of them once in the epochs [0, k), once in [k, 2 k), and so on, in an order of
    its own each time.
    """
    turns, within = np.divmod(epochs, counts)
    base = np.uint64(hash64("captions", seed))
    keys = _mix(_mix(base ^ samples.astype(np.uint64)) + turns.astype(np.uint64) * _TURN)
    return permute(within, counts, keys)


class GlobalOrder:
    """The sample at a position, when any sample costs the same to reach (token arrays).

    Each epoch permutes the whole split with a key of its own.
    """

    def __init__(self, samples: int, seed: int) -> None:
        """`samples`: of the split."""
        self.samples = samples
        self.seed = seed

    def locate(self, positions: Ints) -> tuple[Ints, Ints]:
        """(sample, epoch), int64 [n] each, at positions counted from the start of training."""
        epochs, within = np.divmod(np.asarray(positions, dtype=np.int64), self.samples)
        keys = np.empty(len(within), np.uint64)
        for epoch in np.unique(epochs).tolist():
            keys[epochs == epoch] = hash64("tokens", self.seed, epoch)
        return permute(within, self.samples, keys), epochs


class ShardOrder:
    """The sample at a position, when reading should stay close together (image shards).

    In each epoch the shards are permuted and laid end to end, the samples of each permuted within it. That row of N
    samples is cut into `streams` equal runs, the canonical streams (they differ by one sample at most, however
    uneven the shards are), and the epoch takes one sample of each stream in turn. So a batch mixes `streams` shards,
    each stream has one shard open at a time, and nothing of the order depends on how many ranks or workers read.
    """

    def __init__(self, counts: list[int], seed: int, streams: int = CANONICAL_STREAMS) -> None:
        """`counts`: samples of each shard, in the fixed order of shards."""
        self.counts = np.array(counts, dtype=np.int64)
        self.samples = int(self.counts.sum())
        self.seed = seed
        self.streams = streams
        self._first = np.cumsum(self.counts) - self.counts
        self._latest: tuple[int, _Layout] | None = None

    def locate(self, positions: Ints) -> tuple[Ints, Ints]:
        """(sample, epoch), int64 [n] each, at positions counted from the start of training."""
        epochs, within = np.divmod(np.asarray(positions, dtype=np.int64), self.samples)
        samples = np.empty_like(within)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            samples[here] = self._locate_in_epoch(epoch, within[here])
        return samples, epochs

    def _locate_in_epoch(self, epoch: int, within: Ints) -> Ints:
        shards, ends, keys = self._layout(epoch)
        turn, stream = np.divmod(within, self.streams)
        length, longer = divmod(self.samples, self.streams)
        position = stream * length + np.minimum(stream, longer) + turn
        slot = np.searchsorted(ends, position, side="right")
        shard = shards[slot]
        offset = position - (ends[slot] - self.counts[shard])
        return self._first[shard] + permute(offset, self.counts[shard], keys[slot])

    def _layout(self, epoch: int) -> _Layout:
        latest = self._latest
        if latest is not None and latest[0] == epoch:
            return latest[1]
        key = hash64("shards", self.seed, epoch)
        slots = np.arange(len(self.counts))
        shards = permute(slots, len(self.counts), key)
        layout: _Layout = (shards, np.cumsum(self.counts[shards]), _mix(np.uint64(key) ^ slots.astype(np.uint64)))
        # One assignment: threads that read different epochs at once each keep a consistent layout.
        self._latest = (epoch, layout)
        return layout
