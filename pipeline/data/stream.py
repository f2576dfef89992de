"""Image shards -> batches of images, in the order of `order.ShardOrder` or `mixture.Mixture`, for this rank.

    stream = ImageStream(run.input("prepare"), "train", seed=run.seed)
    for batch in stream.batches(consumed=0, batch_size=64):
        batch["images"]     # uint8 [64 / ranks, 3, H, W], on this process's device

The only state is how many samples were consumed. The tars are read through their offsets rather than front to back:
a tar is random access once indexed, which makes the shuffle exact (no shuffle buffer whose content a restart would
lose), lets a resume begin at any sample without reading what comes before, and saves the parsing of tar headers.
Locality stays: a canonical stream reads one shard at a time, so the system's cache and read-ahead serve it.

Decoding happens after the shuffle, in threads, a few batches ahead (`prefetch.py`). Images of a small data set stay in
memory decoded, so each is decoded once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.config.training import samples_per_process
from pipeline.core import distributed
from pipeline.core.errors import UserError
from pipeline.core.image_size import height_width, image_size, told
from pipeline.core.process_limits import processors
from pipeline.data.augment import Augment
from pipeline.data.fetch_ahead import fetched_ahead
from pipeline.data.mixture import Shares, shard_order, source_sizes
from pipeline.data.order import CANONICAL_STREAMS, Ints
from pipeline.data.prefetch import load
from pipeline.data.remote_file import RemoteFile
from pipeline.data.shard_file import ShardFile, tar_elsewhere
from pipeline.data.shards import read_index, read_shards
from pipeline.data.stored_image import Pixels

_OPEN_SHARDS = 3 * CANONICAL_STREAMS  # of two files each, and 1,024 is a common limit
_SAMPLES_AHEAD = 16_384  # whose blocks are fetched: a part of the next shard of each canonical stream
_SMALL_PIXELS = 128
_DECODE_TOGETHER = 16  # images a task of the thread pool: small ones would cost more to hand out than to decode


class ImageStream:
    """Endless shuffled batches of the images of one split, this rank's share of each."""

    def __init__(
        self,
        prepare_dir: Path,
        split: str,
        seed: int,
        *,
        rank: int | None = None,
        world_size: int | None = None,
        cache_bytes: int = 512 << 20,
        threads: int | None = None,
        shares: Shares = (),
        augment: Augment | None = None,
        beside: Callable[[Ints, Ints], dict[str, Tensor]] | None = None,
    ) -> None:
        """
        Args:
            prepare_dir: the directory of a finished `prepare`.
            split: "train" or "val".
            rank, world_size: this process among all; by default those of `pipeline.core.distributed`.
            cache_bytes: decoded images are kept in memory when the whole split fits into this.
            threads: decoding threads. None: the processors of this process less one, and one for images below 128
                pixels, where two would wait for each other.
            shares: of several sources in a training (`mixture.py`); empty: every sample once an epoch, for validation.
            augment: random parts and mirror images, a function of (seed, epoch, sample); None: images as they are.
            beside: (sample, epoch) of each of a batch's images, samples counted through all shards -> what else the
                batch has of them.

        Raises:
            UserError: there are no shards, or the split is empty.
        """
        self.directory = Path(prepare_dir)
        index = read_index(self.directory)
        self.image_size = image_size(index["image_size"])
        height, width = height_width(self.image_size)
        self._shape = (3, height, width)
        self.shards = read_shards(self.directory, split, index)
        sizes = source_sizes(self.directory, split, shares)
        self.order = shard_order(self.shards.samples.tolist(), sizes, seed, shares)
        self.rank = distributed.rank() if rank is None else rank
        self.world_size = distributed.world_size() if world_size is None else world_size
        many = height * width >= _SMALL_PIXELS**2
        self.threads = threads or (max(1, processors() - 1) if many else 1)
        self._beside, self._augment, self._seed = beside, augment, seed
        self._first = np.cumsum([0, *self.shards.samples])
        self._files: dict[int, ShardFile] = {}
        self._lock = threading.Lock()
        shape = (len(self), *self._shape)
        cached = int(np.prod(shape, dtype=np.int64)) <= cache_bytes
        self._cache = np.empty(shape, np.uint8) if cached else None
        self._known = np.zeros(len(self) if cached else 0, bool)

    def __len__(self) -> int:
        """Samples of the split."""
        return self.order.samples

    def batches(self, consumed: int, batch_size: int) -> Generator[dict[str, Tensor], None, None]:
        """Endless batches from global sample `consumed` on; `{"images": uint8 [batch_size / ranks, 3, H, W]}`.

        Rank r of W gets samples [r * b / W, (r + 1) * b / W) of each global batch of b. Epochs follow each other
        without a gap: a batch may hold the last samples of one and the first of the next.

        Raises:
            UserError: the number of ranks does not divide `batch_size`, or a shard is damaged.
        """
        share = samples_per_process(batch_size, self.world_size)
        return load(self._batches(consumed + self.rank * share, batch_size, share))

    def _batches(self, start: int, stride: int, share: int) -> Generator[dict[str, Tensor], None, None]:
        with ThreadPoolExecutor(self.threads, thread_name_prefix="decode") as pool:
            for samples, epochs in self._planned(start, stride, share):
                more = self._beside(samples, epochs) if self._beside else {}
                images = self._augmented(self._images(samples, pool), samples, epochs, pool)
                yield {"images": torch.from_numpy(images)} | more

    def _planned(self, start: int, stride: int, share: int) -> Iterator[tuple[Ints, Ints]]:
        """(samples, epochs) of each batch; tars in object stores are fetched ahead."""
        plan = (self.order.locate(np.arange(at, at + share)) for at in count(start, stride))
        ends = [tar_elsewhere(self.directory, self.shards[n]) for n in (0, len(self.shards) - 1)]
        if not (found := [tar.size for tar in ends if tar]):
            return plan
        at_once = min(CANONICAL_STREAMS, len(self.shards)) * max(found)
        return fetched_ahead(plan, self._blocks, max(1, _SAMPLES_AHEAD // share), at_once)

    def _blocks(self, planned: tuple[Ints, Ints]) -> list[tuple[RemoteFile, int]]:
        """The blocks of object stores that hold images of these samples which are not in memory."""
        samples = planned[0] if self._cache is None else planned[0][~self._known[planned[0]]]
        shards = np.searchsorted(self._first, samples, side="right") - 1
        found: dict[tuple[RemoteFile, int], None] = {}
        for shard, row in zip(shards.tolist(), (samples - self._first[shards]).tolist(), strict=True):
            file = self._open(shard)
            if file.remote is not None:
                begin, size, _ = file.place(row)
                found |= dict.fromkeys(file.remote.blocks(begin, size))
        return list(found)

    def _images(self, samples: Ints, pool: ThreadPoolExecutor) -> Pixels:
        """The images of these samples, uint8 [n, 3, H, W], decoded or from the cache."""
        if self._cache is None:
            return self._decode_all(samples, pool)
        new = samples[~self._known[samples]]
        if len(new):
            self._cache[new] = self._decode_all(new, pool)
            self._known[new] = True
        return self._cache[samples]

    def _augmented(self, images: Pixels, samples: Ints, epochs: Ints, pool: ThreadPoolExecutor) -> Pixels:
        """uint8 [n, 3, H, W], images of these samples in these epochs."""
        augment = self._augment
        if augment is None or not augment.is_on:
            return images

        def change(start: int) -> None:
            for index in range(start, min(start + _DECODE_TOGETHER, len(images))):
                images[index] = augment.apply(images[index], self._seed, int(epochs[index]), int(samples[index]))

        list(pool.map(change, range(0, len(images), _DECODE_TOGETHER)))
        return images

    def _decode_all(self, samples: Ints, pool: ThreadPoolExecutor) -> Pixels:
        images = np.empty((len(samples), *self._shape), np.uint8)
        shards = np.searchsorted(self._first, samples, side="right") - 1
        rows = samples - self._first[shards]

        def decode(start: int) -> None:
            for index in range(start, min(start + _DECODE_TOGETHER, len(rows))):
                images[index] = self._decode(int(shards[index]), int(rows[index]))

        list(pool.map(decode, range(0, len(rows), _DECODE_TOGETHER)))
        return images

    def _decode(self, shard: int, row: int) -> Pixels:
        file = self._open(shard)
        image = file.pixels(row)
        if image.shape != self._shape:
            raise UserError(
                f"{file.path}: expected images of {told(self.image_size)}, found {image.shape} at sample {row}"
            )
        return image

    def _open(self, shard: int) -> ShardFile:
        """The file of a shard, kept open; of too many, the one that was opened first is let go."""
        with self._lock:
            if shard not in self._files:
                if len(self._files) >= _OPEN_SHARDS:
                    # Not closed by hand: a thread may be reading from it; the last reference closes it.
                    del self._files[next(iter(self._files))]
                entry = self.shards[shard]
                self._files[shard] = ShardFile(self.directory, entry)
            return self._files[shard]
