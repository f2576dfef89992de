"""Several sources in one order: exact shares in every 1,000 samples, each source shuffled by itself.

    shares = [(0, (700, 300)), (64_000, (500, 500))]       # from sample 64,000 on other weights
    order = Mixture([ShardOrder(counts, seed) for counts in …], shares)
    order.locate(positions)                                # (sample of the split, epoch of its source), as other orders

From the position on where its shares begin to hold, the sources come in a row of 1,000 that is repeated, so any 1,000
samples in a row have exactly their shares; in it, each source is spread evenly. A source's own order continues where
it was, whatever the shares were before. All is a function of the position, and nothing of the number of processes.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from pipeline.config.training import TrainingConfig
from pipeline.core import distributed
from pipeline.core.atomic_io import read_json
from pipeline.core.errors import UserError
from pipeline.core.seeds import hash64
from pipeline.data.order import CANONICAL_STREAMS, GlobalOrder, Ints, ShardOrder

Shares = Sequence[tuple[int, Sequence[int]]]  # (first position, samples of each source in a row of ROW), ascending

ROW = 1_000

log = logging.getLogger(__name__)


class Order(Protocol):
    """Which sample comes at a position."""

    samples: int  # of the split, or of the source

    def locate(self, positions: Ints) -> tuple[Ints, Ints]:
        """(sample, epoch), int64 [n] each, at positions counted from the start of training."""


class Mixture:
    """The sample at a position, of several sources."""

    def __init__(self, orders: Sequence[Order], shares: Shares) -> None:
        """
        Args:
            orders: of each source by itself; their samples lie one source after the other in the split.
            shares: the first from position 0 on.
        """
        self.orders, self.shares = orders, shares
        sizes = np.array([order.samples for order in orders], dtype=np.int64)
        self.samples = int(sizes.sum())
        self._first_sample = np.cumsum(sizes) - sizes
        self._begins = np.array([begin for begin, _ in shares], dtype=np.int64)
        self._rows = [_Row(counts) for _, counts in shares]
        self._before = [np.zeros(len(orders), np.int64)]  # samples of each source before each change of shares
        for row, length in zip(self._rows, np.diff(self._begins).tolist(), strict=False):
            self._before.append(self._before[-1] + row.counts(length))

    def locate(self, positions: Ints) -> tuple[Ints, Ints]:
        """(sample of the split, epoch of its source), int64 [n] each, at positions from the start of training."""
        positions = np.asarray(positions, dtype=np.int64)
        samples, epochs = np.empty_like(positions), np.empty_like(positions)
        sources, places = self.sources(positions)
        for source in np.unique(sources).tolist():
            here = sources == source
            own, epochs[here] = self.orders[source].locate(places[here])
            samples[here] = self._first_sample[source] + own
        return samples, epochs

    def sources(self, positions: Ints) -> tuple[Ints, Ints]:
        """(source, how many samples of it came before), int64 [n] each."""
        sources, places = np.empty_like(positions), np.empty_like(positions)
        changes = np.searchsorted(self._begins, positions, side="right") - 1
        for change in np.unique(changes).tolist():
            here = changes == change
            sources[here], before = self._rows[change].locate(positions[here] - self._begins[change])
            places[here] = self._before[change][sources[here]] + before
        return sources, places

    def epochs(self, position: int) -> list[float]:
        """How often each source was gone through before a position."""
        change = int(np.searchsorted(self._begins, position, side="right")) - 1
        counts = self._before[change] + self._rows[change].counts(position - int(self._begins[change]))
        return [count / order.samples for count, order in zip(counts.tolist(), self.orders, strict=True)]


class _Row:
    """The sources of `ROW` samples, which repeat: sample j of n of a source lies near (j + 1/2) / n of it."""

    def __init__(self, counts: Sequence[int]) -> None:
        self._counts = np.array(counts, dtype=np.int64)
        sources = np.repeat(np.arange(len(counts)), self._counts)
        numbers = np.concatenate([np.arange(count) for count in counts])
        # Fractions of such small numbers are equal as floats where they are equal: then the first source comes first.
        order = np.lexsort((sources, (2 * numbers + 1) / (2 * self._counts[sources])))
        self._sources, self._numbers = sources[order], numbers[order]

    def locate(self, offsets: Ints) -> tuple[Ints, Ints]:
        """(source, samples of it before), int64 [n] each, at offsets into the rows."""
        rows, within = np.divmod(offsets, ROW)
        sources = self._sources[within]
        return sources, rows * self._counts[sources] + self._numbers[within]

    def counts(self, length: int) -> Ints:
        """int64 [sources]: samples of each in the first `length`."""
        rows, rest = divmod(length, ROW)
        return rows * self._counts + np.bincount(self._sources[:rest], minlength=len(self._counts))


def source_sizes(directory: Path, split: str, shares: Shares) -> list[int]:
    """Samples of each source of a split, from index.json of `prepare` or `tokenize`; without shares, empty.

    Raises:
        UserError: there are shares of other sources than were prepared.
    """
    if not shares:
        return []
    path = directory / "index.json"
    sizes: list[int] = read_json(path)["splits"][split].get("sources", [])
    if len(sizes) != len(shares[0][1]):
        raise UserError(
            f"{path}: expected samples of {len(shares[0][1])} sources, found those of {len(sizes) or 1}: run `smalti "
            "run`, which makes it again"
        )
    return sizes


def tell_sources(order: Order, names: Sequence[str], training: TrainingConfig) -> None:
    """Log a line for each source of a mixture: its share, its size, and how often the training repeats it."""
    if not isinstance(order, Mixture) or not distributed.is_main():
        return
    repeats = order.epochs(training.steps * training.batch_size)
    for name, share, own, repeat in zip(names, order.shares[-1][1], order.orders, repeats, strict=True):
        log.info("%s: %d of each 1,000 samples; of its %d, repeat %.3g", name, share, own.samples, repeat)


def epoch_metrics(order: Order, names: Sequence[str], samples: int) -> dict[str, float]:
    """How often each source of a mixture was gone through in the first `samples` of a training."""
    epochs = order.epochs(samples) if isinstance(order, Mixture) else []
    return {f"epochs/{name}": count for name, count in zip(names, epochs, strict=False)}


def shard_order(counts: Sequence[int], sizes: Sequence[int], seed: int, shares: Shares) -> Order:
    """The order of the samples of image shards.

    Args:
        counts: samples of each shard.
        sizes: samples of each source, whose shards lie one source after the other.
        shares: of the sources; empty: all samples alike, each once an epoch.
    """
    if not shares:
        return ShardOrder(list(counts), seed)
    ends = np.searchsorted(np.cumsum(counts), np.cumsum(sizes)) + 1
    own = np.split(np.array(counts, dtype=np.int64), ends[:-1])
    streams = max(1, CANONICAL_STREAMS // len(own))  # as many shards are open as of one source
    orders = [ShardOrder(of.tolist(), _seed(seed, source), streams) for source, of in enumerate(own)]
    return Mixture(orders, shares)


def token_order(samples: int, sizes: Sequence[int], seed: int, shares: Shares) -> Order:
    """The same for token arrays of so many samples."""
    if not shares:
        return GlobalOrder(samples, seed)
    return Mixture([GlobalOrder(size, _seed(seed, source)) for source, size in enumerate(sizes)], shares)


def _seed(seed: int, source: int) -> int:
    return hash64("source", seed, source)
