"""Which samples to leave out because an earlier one has the same key, or shows the same image.

Every part leaves two 64-bit hashes per sample in a file: of the key, and of what the image looks like. "Earlier" is by
part, then by position in it, so the answer is a function of the source.

Keys: memory stays below 2 GB at any number of samples, since the hashes are compared a slice of their range at a time
(2^26 samples per slice; each slice reads all files once). Two different keys share a hash with a probability of
n^2 / 2^65: among 10^9 samples one is lost that way with 3 %, and listed as a duplicate.

Images: about 50 bytes of memory per sample, which is the limit of the near-duplicate filter: 5 GB for 10^8 samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Hashes = NDArray[np.uint64]

KEY, IMAGE = 0, 1  # columns of the files
_SAMPLES_PER_SLICE = 1 << 26


def same_key(files: Sequence[Path], counts: Sequence[int], samples_per_slice: int = _SAMPLES_PER_SLICE) -> Ints:
    """Numbers (from 0, over all files) of the samples whose key an earlier sample has, ascending.

    Args:
        files: `.npy`, uint64 [samples, 2], one per part, in their order.
        counts: samples of each part.
    """
    starts = np.cumsum([0, *counts])
    slices = 1
    while starts[-1] > slices * samples_per_slice:
        slices *= 2
    found = [np.empty(0, np.int64)]
    for number in range(slices):
        hashes, samples = [], []
        for path, start in zip(files, starts[:-1], strict=True):
            keys = np.load(path)[:, KEY]
            here = np.flatnonzero(leading_bits(keys, slices) == number) if slices > 1 else np.arange(len(keys))
            hashes.append(keys[here])
            samples.append(here + start)
        if hashes:
            found.append(_repeated(np.concatenate(hashes), np.concatenate(samples)))
    return np.sort(np.concatenate(found))


def same_image(files: Sequence[Path], bits: int, without: Ints) -> Ints:
    """Numbers of the samples whose hash differs in at most `bits` bits from an earlier one's, ascending.

    Samples `without` are not looked at.
    """
    if not files:
        return np.empty(0, np.int64)
    hashes = np.concatenate([np.load(path)[:, IMAGE] for path in files])
    samples = np.delete(np.arange(len(hashes)), without)
    hashes = hashes[samples]
    equal = _repeated(hashes, samples)
    first = ~np.isin(samples, equal)
    return np.sort(np.concatenate([equal, samples[first][_near_an_earlier(hashes[first], bits)]]))


def leading_bits(hashes: Hashes, slices: int) -> Hashes:
    """Which slice of the range of hashes each is in; `slices`: a power of two, of at least two."""
    shift = 64 - (slices.bit_length() - 1)
    return hashes >> np.uint64(shift)


def _repeated(hashes: Hashes, samples: Ints) -> Ints:
    """The samples whose hash came before; `samples` are in their order, with a hash each."""
    order = np.argsort(hashes, kind="stable")
    again = np.flatnonzero(hashes[order][1:] == hashes[order][:-1]) + 1
    return samples[order[again]]


def _near_an_earlier(hashes: Hashes, bits: int) -> NDArray[np.bool_]:
    """Which hashes differ in at most `bits` bits from one before them; no two are equal.

    Cut into 2 * bits blocks, two such hashes agree in at least half of the blocks; so sorting by each choice of half
    the blocks brings every pair together (Manku, Jain & Das Sarma 2007, "Detecting near-duplicates for web crawling").
    """
    near = np.zeros(len(hashes), bool)
    if not bits:
        return near
    borders = np.linspace(0, 64, 2 * bits + 1).astype(int).tolist()
    blocks = [(1 << end) - (1 << start) for start, end in pairwise(borders)]
    for chosen in combinations(blocks, bits):
        masked = hashes & np.uint64(sum(chosen))
        order = np.argsort(masked, kind="stable")  # stable: within a group the earlier ones stand first
        masked, sorted_hashes = masked[order], hashes[order]
        here, distance = np.arange(len(order)), 1
        while len(here := here[: np.searchsorted(here, len(order) - distance)]):
            here = here[masked[here] == masked[here + distance]]
            close = np.bitwise_count(sorted_hashes[here] ^ sorted_hashes[here + distance]) <= bits
            near[order[here[close] + distance]] = True
            distance += 1
    return near
