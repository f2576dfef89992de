"""Pairs (hash, number of a sample) that need not fit into memory: dealt by hash into slices, in a file without a name.

    with closing(Spilled(pieces, slices, folder)) as dealt:
        for number in range(slices):
            pairs = dealt.slice(number)      # uint64 [n, 2], in the order in which they came

The system removes the file when it is closed, and when its process is killed. Few pairs stay in memory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.core import signals
from pipeline.core.atomic_io import is_full, no_space

Hashes = NDArray[np.uint64]
Pairs = NDArray[np.uint64]  # [n, 2]: hash, number of its sample

PIECE = 1 << 20  # pairs that are read and dealt together
_IN_MEMORY_BYTES = 1 << 25
_PAIR_BYTES = 16
_ODD = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: spreads hashes that lie close together


def leading_bits(hashes: Hashes, slices: int) -> Hashes:
    """Which slice of the range of hashes each is in; `slices`: a power of two, of at least two."""
    shift = 64 - (slices.bit_length() - 1)
    return hashes >> np.uint64(shift)


def slices_of(count: int, per_slice: int) -> int:
    """How many slices, a power of two, have `per_slice` pairs or fewer on average."""
    return 1 << max(0, -(-count // per_slice) - 1).bit_length()


class Spilled:
    """Pairs in slices: those whose hashes have the same bits `agreeing` are in one."""

    def __init__(self, pieces: Iterable[Pairs], slices: int, folder: Path, agreeing: int = (1 << 64) - 1) -> None:
        """
        Args:
            pieces: pairs, some at a time.
            slices: a power of two, at most 2^16; the pairs are spread over them by a hash of their bits `agreeing`.
            folder: where the file lies; it takes 16 bytes a pair.

        Raises:
            UserError: the disk is full.
            StoppedOnRequest: asked to stop.
        """
        file: tempfile.SpooledTemporaryFile[bytes]
        file = tempfile.SpooledTemporaryFile(_IN_MEMORY_BYTES, dir=str(folder))  # noqa: SIM115
        self._file = file
        self._slices = slices
        self._bounds = [np.zeros(slices + 1, np.int64)]  # of the slices of each piece, in pairs from the file's begin
        try:
            for piece in together(pieces):
                signals.check()
                self._add(piece, agreeing)
        except BaseException as error:
            full = is_full(folder, error)
            self.close()
            if full:
                raise no_space(folder) from error
            raise

    def _add(self, piece: Pairs, agreeing: int) -> None:
        counts = np.array([len(piece)])
        if self._slices > 1:
            spread = leading_bits((piece[:, 0] & np.uint64(agreeing)) * _ODD, self._slices).astype(np.uint16)
            counts = np.bincount(spread, minlength=self._slices)
            piece = piece[np.argsort(spread, kind="stable")]
        self._file.write(np.ascontiguousarray(piece).data)
        self._bounds.append(self._bounds[-1][-1] + np.cumsum([0, *counts]))

    def __len__(self) -> int:
        """Pairs in all slices."""
        return int(self._bounds[-1][-1])

    def size(self, number: int) -> int:
        """Pairs of a slice."""
        return sum(int(bounds[number + 1] - bounds[number]) for bounds in self._bounds)

    def pieces(self, number: int = 0) -> Iterator[Pairs]:
        """The pairs of a slice, some at a time, in the order in which they came."""
        return together(self._read(int(bounds[number]), int(bounds[number + 1])) for bounds in self._bounds)

    def slice(self, number: int) -> Pairs:
        """All pairs of a slice, in the order in which they came."""
        return np.concatenate([np.empty((0, 2), np.uint64), *self.pieces(number)])

    def _read(self, begin: int, end: int) -> Pairs:
        self._file.seek(begin * _PAIR_BYTES)
        return np.frombuffer(self._file.read((end - begin) * _PAIR_BYTES), np.uint64).reshape(-1, 2)

    def close(self) -> None:
        """Give the file back."""
        self._file.close()


def together(pieces: Iterable[Pairs]) -> Iterator[Pairs]:
    """Pieces put together until they have `PIECE` pairs or more, but for the last."""
    waiting: list[Pairs] = []
    count = 0
    for piece in pieces:
        waiting.append(piece)
        count += len(piece)
        if count >= PIECE:
            yield np.concatenate(waiting)
            waiting, count = [], 0
    if count:
        yield np.concatenate(waiting)
