"""Which samples to leave out because an earlier one has the same key, or shows the same image.

Every part leaves two 64-bit hashes per sample in a file: of the key, and of what the image looks like. "Earlier" is by
part, then by position in it, so the answer is a function of the source.

Memory: two bytes a sample, and some 500 MB whatever their number, for the hashes are dealt into slices on the disk,
beside the files (`spilled.py`; 32 bytes a sample), of which one at a time is compared. Two different keys share a hash
with a probability of n^2 / 2^65: among 10^9 samples one is lost that way with 3 %, and listed as a duplicate.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import combinations
from math import comb
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.core import signals
from pipeline.core.progress import progress
from pipeline.data.spilled import Hashes, Pairs, Spilled, slices_of

Ints = NDArray[np.int64]
Marks = NDArray[np.bool_]

KEY, IMAGE = 0, 1  # columns of the files
_PER_SLICE = 1 << 21  # samples that are compared in memory: of some 110 bytes then
_GROUP = 256  # hashes that are compared each with each, at most; more than 2^8, so larger groups differ in 9 bits
_LOOKED_AT = 1 << 16  # pairs of hashes that say which bits differ how often
_ALL = (1 << 64) - 1


def same_key(files: Sequence[Path], counts: Sequence[int], per_slice: int = _PER_SLICE) -> Marks:
    """Whether an earlier sample has the key of each, over all files: bool [samples].

    Args:
        files: `.npy`, uint64 [samples, 2], one per part, in their order.
        counts: samples of each part.
        per_slice: how many are compared at a time.

    Raises:
        UserError: the disk is full.
        StoppedOnRequest: asked to stop.
    """
    found = np.zeros(sum(counts), bool)
    if len(found):
        _mark_repeated(files, KEY, np.zeros(0, bool), found, per_slice)
    return found


def same_image(files: Sequence[Path], bits: int, without: Marks, per_slice: int = _PER_SLICE) -> Marks:
    """Whether the hash of each sample differs in at most `bits` (0 to 4) bits from an earlier one's: bool [samples].

    Samples `without`, bool [samples], are not looked at.

    Raises:
        UserError: the disk is full.
        StoppedOnRequest: asked to stop.
    """
    found = np.zeros(len(without), bool)
    if not len(found):
        return found
    _mark_repeated(files, IMAGE, without, found, per_slice)
    if not bits:
        return found
    with closing(Spilled(_pairs(files, IMAGE, without, found), 1, files[0].parent)) as different:
        passes = comb(2 * bits, bits) * slices_of(len(different), per_slice)
        shown = len(different) > _LOOKED_AT
        with progress(total=passes, description="near-duplicates", unit="pass", shown=shown) as bar:
            for _ in _near(different, 0, bits, found, files[0].parent, per_slice):
                bar.update(1)
    return found


def _pairs(files: Sequence[Path], column: int, *without: Marks) -> Iterator[Pairs]:
    """(hash, number of the sample) of each part's samples, but for those in `without`."""
    start = 0
    for path in files:
        own = np.load(path)[:, column]
        numbers = np.arange(start, start + len(own), dtype=np.uint64)
        pairs = np.stack([own, numbers], axis=1)
        left_out = np.zeros(len(own), bool)
        for marks in without:
            if len(marks):
                left_out |= marks[start : start + len(own)]
        yield pairs[~left_out] if left_out.any() else pairs
        start += len(own)


def _mark_repeated(files: Sequence[Path], column: int, without: Marks, found: Marks, per_slice: int) -> None:
    """Mark in `found` the samples whose hash in a column an earlier sample has, but for those `without`."""
    slices = slices_of(len(found), per_slice)
    with closing(Spilled(_pairs(files, column, without), slices, files[0].parent)) as dealt:
        for number in range(slices):
            known = np.empty(0, np.uint64)  # of a slice however large (many images may be one) the different hashes
            for pairs in dealt.pieces(number):
                signals.check()
                order = np.argsort(pairs[:, 0], kind="stable")
                hashes, samples = pairs[order, 0], pairs[order, 1].astype(np.int64)
                is_new = np.concatenate([[True], hashes[1:] != hashes[:-1]])
                if len(known):
                    places = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
                    is_new &= known[places] != hashes
                found[samples[~is_new]] = True
                known = np.union1d(known, hashes[is_new])


def _near(own: Spilled, agreeing: int, bits: int, near: Marks, folder: Path, per_slice: int) -> Iterator[None]:
    """Mark in `near` which of `own` differ in at most `bits` bits from one before them; no two hashes are equal.

    Only those that have the same bits `agreeing` need be compared. Yields after each slice of each pass.

    Dealt into 2 * bits blocks, two such hashes agree in at least half of the blocks; so sorting by each choice of half
    the blocks brings every pair together (Manku, Jain & Das Sarma 2007, "Detecting near-duplicates for web crawling").
    Bits that differ often are dealt first, a block each in turn: images with white backgrounds or few colours agree in
    most others, and blocks of these would bring all of them together.
    """
    slices = slices_of(len(own), per_slice)
    step = max(1, len(own) // _LOOKED_AT)
    differences = [piece[:-1:step, 0] ^ piece[1::step, 0] for piece in own.pieces()]
    if not differences:
        return
    for chosen in combinations(_dealt(np.concatenate(differences), _ALL & ~agreeing, 2 * bits), bits):
        both = agreeing | sum(chosen)
        with closing(Spilled(own.pieces(), slices, folder, both)) as dealt:
            for number in range(slices):
                if dealt.size(number) > 2 * per_slice and _is_divisible(both):
                    with closing(Spilled(dealt.pieces(number), 1, folder)) as large:
                        for _ in _near(large, both, bits, near, folder, per_slice):
                            pass
                elif dealt.size(number):
                    pairs = dealt.slice(number)
                    hashes, samples = np.ascontiguousarray(pairs[:, 0]), pairs[:, 1].astype(np.int64)
                    del pairs
                    marks = near[samples]
                    _mark(hashes, np.arange(len(hashes)), both, bits, marks)
                    near[samples[marks]] = True
                yield


def _is_divisible(agreeing: int) -> bool:
    """Whether more hashes may have the same bits `agreeing` than are compared each with each."""
    return 1 << (64 - agreeing.bit_count()) > _GROUP


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
    free = _ALL & ~agreeing
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
