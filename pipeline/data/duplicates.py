"""Which samples to leave out because an earlier one has the same key, or shows the same image.

Every part leaves two 64-bit hashes per sample in a file: of the key, and of what the image looks like. "Earlier" is by
part, then by position in it, so the answer is a function of the source.

Keys: memory stays below 2 GB at any number of samples, since the hashes are compared a slice of their range at a time
(2^26 samples per slice; each slice reads all files once). Two different keys share a hash with a probability of
n^2 / 2^65: among 10^9 samples one is lost that way with 3 %, and listed as a duplicate.

Images: 20 bytes of memory per sample and a GB for a slice: 3 GB for 10^8 samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from math import comb
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.core import signals
from pipeline.core.progress import progress

Ints = NDArray[np.int64]
Hashes = NDArray[np.uint64]

KEY, IMAGE = 0, 1  # columns of the files
_SAMPLES_PER_SLICE = 1 << 26
_IMAGES_PER_SLICE = 1 << 24  # they are sorted with more beside them
_GROUP = 256  # hashes that are compared each with each, at most; more than 2^8, so larger groups differ in 9 bits
_LOOKED_AT = 1 << 16  # pairs of hashes that say which bits differ how often
_ODD = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: spreads hashes that lie close together


def same_key(files: Sequence[Path], counts: Sequence[int], samples_per_slice: int = _SAMPLES_PER_SLICE) -> Ints:
    """Numbers (from 0, over all files) of the samples whose key an earlier sample has, ascending.

    Args:
        files: `.npy`, uint64 [samples, 2], one per part, in their order.
        counts: samples of each part.
    """
    return _repeated_in(files, counts, KEY, np.empty(0, np.int64), samples_per_slice)


def same_image(files: Sequence[Path], bits: int, without: Ints, samples_per_slice: int = _IMAGES_PER_SLICE) -> Ints:
    """Numbers of the samples whose hash differs in at most `bits` (0 to 4) bits from an earlier one's, ascending.

    Samples `without`, ascending, are not looked at.

    Raises:
        StoppedOnRequest: asked to stop.
    """
    counts = [len(np.load(path, mmap_mode="r")) for path in files]
    starts = np.cumsum([0, *counts])
    equal = _repeated_in(files, counts, IMAGE, without, samples_per_slice)
    different = np.ones(starts[-1], bool)
    different[without] = different[equal] = False
    hashes = [np.empty(0, np.uint64)]
    for path, start, count in zip(files, starts[:-1], counts, strict=True):
        hashes.append(np.load(path)[different[start : start + count], IMAGE])
    near = _near_an_earlier(np.concatenate(hashes), bits, samples_per_slice)
    return np.sort(np.concatenate([equal, np.flatnonzero(different)[near]]))


def leading_bits(hashes: Hashes, slices: int) -> Hashes:
    """Which slice of the range of hashes each is in; `slices`: a power of two, of at least two."""
    shift = 64 - (slices.bit_length() - 1)
    return hashes >> np.uint64(shift)


def _slices(samples: int, samples_per_slice: int) -> int:
    """A power of two."""
    return 1 << max(0, -(-samples // samples_per_slice) - 1).bit_length()


def _in_slice(hashes: Hashes, number: int, slices: int) -> Ints:
    """Where the hashes of a slice are; those of images are anything but spread evenly."""
    if slices == 1:
        return np.arange(len(hashes))
    return np.flatnonzero(leading_bits(hashes * _ODD, slices) == number)


def _repeated_in(
    files: Sequence[Path], counts: Sequence[int], column: int, without: Ints, samples_per_slice: int
) -> Ints:
    """Numbers of the samples whose hash in a column an earlier sample has, ascending, but for those `without`."""
    starts = np.cumsum([0, *counts])
    slices = _slices(int(starts[-1]), samples_per_slice)
    bounds = np.searchsorted(without, starts)
    found = [np.empty(0, np.int64)]
    for number in range(slices):
        signals.check()
        hashes, samples = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
        for part, path in enumerate(files):
            own = np.load(path)[:, column]
            here = _in_slice(own, number, slices)
            left_out = without[bounds[part] : bounds[part + 1]] - starts[part]
            if len(left_out):
                here = np.setdiff1d(here, left_out, assume_unique=True)
            hashes.append(own[here])
            samples.append(here + starts[part])
        found.append(_repeated(np.concatenate(hashes), np.concatenate(samples)))
    return np.sort(np.concatenate(found))


def _repeated(hashes: Hashes, samples: Ints) -> Ints:
    """The samples whose hash came before; `samples` are in their order, with a hash each."""
    order = np.argsort(hashes, kind="stable")
    again = np.flatnonzero(hashes[order][1:] == hashes[order][:-1]) + 1
    return samples[order[again]]


def _near_an_earlier(hashes: Hashes, bits: int, per_slice: int = _IMAGES_PER_SLICE) -> NDArray[np.bool_]:
    """Which hashes differ in at most `bits` bits from one before them; no two are equal.

    Dealt into 2 * bits blocks, two such hashes agree in at least half of the blocks; so sorting by each choice of half
    the blocks brings every pair together (Manku, Jain & Das Sarma 2007, "Detecting near-duplicates for web crawling").
    Bits that differ often are dealt first, a block each in turn: images with white backgrounds or few colours agree in
    most others, and blocks of these would bring all of them together.
    """
    near = np.zeros(len(hashes), bool)
    if not bits or len(hashes) < 2:
        return near
    slices = _slices(len(hashes), per_slice)
    step = max(1, len(hashes) // _LOOKED_AT)
    blocks = _dealt(hashes[:-1:step] ^ hashes[1::step], (1 << 64) - 1, 2 * bits)
    passes = comb(2 * bits, bits) * slices
    shown = len(hashes) > _LOOKED_AT
    with progress(total=passes, description="near-duplicates", unit="pass", shown=shown) as bar:
        for chosen in combinations(blocks, bits):
            agreeing = sum(chosen)
            for number in range(slices):
                members = _in_slice(hashes & np.uint64(agreeing), number, slices)
                _mark(hashes, members, agreeing, bits, near)
                bar.update(1)
    return near


def _dealt(differences: Hashes, free: int, count: int) -> list[int]:
    """The bits of `free`, those that most `differences` have first, dealt into `count` blocks."""
    often = {bit: int((differences >> np.uint64(bit) & np.uint64(1)).sum()) for bit in range(64) if free >> bit & 1}
    ordered = sorted(often, key=lambda bit: (-often[bit], bit))
    return [sum(1 << bit for bit in ordered[block::count]) for block in range(count)]


def _mark(hashes: Hashes, members: Ints, agreeing: int, bits: int, near: NDArray[np.bool_]) -> None:
    """Mark which of the `members`, ascending, are near an earlier one that has the same bits `agreeing`.

    In groups too large for comparing all, two near hashes agree in half of the blocks again, of the other bits.
    """
    signals.check()
    masked = hashes[members] & np.uint64(agreeing)
    order = np.argsort(masked, kind="stable")  # stable: within a group the earlier ones stand first
    masked, members = masked[order], members[order]
    own = hashes[members]
    begins = np.flatnonzero(np.concatenate([[True], masked[1:] != masked[:-1]]))
    sizes = np.diff(np.append(begins, len(members)))
    undecided = ~near[members]
    undecided[begins] = False
    large = (sizes > _GROUP) & np.logical_or.reduceat(undecided, begins)
    _mark_by_comparing(
        own, members, np.repeat(begins, sizes), undecided & np.repeat(sizes <= _GROUP, sizes), bits, near
    )
    if not large.any():
        return
    inside = np.repeat(large, sizes)
    own, rest = own[inside], np.sort(members[inside])
    step = max(1, len(own) // _LOOKED_AT)
    free = ((1 << 64) - 1) & ~agreeing
    for chosen in combinations(_dealt(own[:-1:step] ^ own[1::step], free, 2 * bits), bits):
        _mark(hashes, rest, agreeing | sum(chosen), bits, near)


def _mark_by_comparing(
    own: Hashes, members: Ints, begins: Ints, targets: NDArray[np.bool_], bits: int, near: NDArray[np.bool_]
) -> None:
    """Compare each target with all before it in its group, which begins at `begins`, until it is near one."""
    here, distance = np.flatnonzero(targets), 1
    while len(here := here[here - distance >= begins[here]]):
        close = np.bitwise_count(own[here] ^ own[here - distance]) <= bits
        near[members[here[close]]] = True
        here = here[~close]
        distance += 1
