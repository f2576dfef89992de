"""Token arrays -> batches, exactly shuffled over the whole split, for this rank.

    sampler = TokenSampler(run.input("tokenize"), "train", seed=run.seed)
    for batch in sampler.batches(consumed=0, batch_size=64):
        batch["text"], batch["codes"]     # int64 [64 / ranks, T], [64 / ranks, N], on this process's device

The order is `order.GlobalOrder`, or `mixture.Mixture` of several sources: computed, not stored. So a start at any
position, at any number of ranks, with any number of samples, costs nothing and takes no memory. A thread gathers
batches ahead (`prefetch.py`).
"""

from __future__ import annotations

from collections.abc import Generator
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.config.training import samples_per_process
from pipeline.core import distributed
from pipeline.core.errors import UserError
from pipeline.core.process_limits import processors
from pipeline.data.caption_workers import CaptionWorkers, Encode
from pipeline.data.fetch_ahead import fetched_ahead
from pipeline.data.mixture import Shares, source_sizes, token_order
from pipeline.data.order import caption_in_epoch
from pipeline.data.prefetch import load
from pipeline.data.tokens import TokenArrays
from pipeline.data.verification import Verification

_BATCHES_AHEAD = 64  # whose blocks are fetched from an object store: a shuffle asks for all of them soon
_MOST_WORKERS = 4  # that encode captions: 64 captions of 40 words in 20 ms


class TokenSampler:
    """Endless shuffled batches of text ids and codes of one split, this rank's share of each."""

    def __init__(
        self,
        tokenize_dir: Path,
        split: str,
        seed: int,
        *,
        rank: int | None = None,
        world_size: int | None = None,
        encode_caption: Encode | None = None,
        draw_captions: bool = False,
        shares: Shares = (),
    ) -> None:
        """`rank`, `world_size`: by default those of `pipeline.core.distributed`. Raises UserError: see TokenArrays.

        `encode_caption`: makes the text ids from the stored captions, with random numbers that are a function of
        (seed, epoch, sample) (BPE dropout), in processes of their own (`CaptionWorkers`); None: the stored ids.
        `draw_captions`: of several captions of a sample each epoch has another one, a function of (seed, epoch, sample)
        too; else always the first.
        `shares`: of several sources in a training (`mixture.py`); empty: every sample once an epoch, as in validation.
        """
        self.arrays = TokenArrays(tokenize_dir, split)
        sizes = source_sizes(self.arrays.directory, split, shares)
        self.order = token_order(len(self.arrays), sizes, seed, shares)
        self.seed = seed
        self._encode_caption = encode_caption
        self._draws = draw_captions and self.arrays.several_captions
        self._verification: Verification | None = None
        self.rank = distributed.rank() if rank is None else rank
        self.world_size = distributed.world_size() if world_size is None else world_size

    def __len__(self) -> int:
        """Samples of the split."""
        return len(self.arrays)

    def verify(self) -> None:
        """Compare all arrays with their checksums, each rank a share of the shards.

        What `verify_behind` has begun is waited for.

        Raises, on every rank, UserError that names the first file that is not as the stage tokenize wrote it.
        """
        verification = self._verification or Verification([partial(self.arrays.verify, self._my_shards())])
        self._verification = None
        for found in distributed.all_gather_objects(verification.result()):
            if found is not None:
                raise found

    def verify_behind(self) -> None:
        """Begin to compare all arrays, in a thread, while batches are read: those raise what it finds by then.

        Call `verify` at the end, which waits for it.
        """
        self._verification = Verification(partial(self._check_behind, shard) for shard in self._my_shards())

    def _my_shards(self) -> range:
        return range(self.rank, self.arrays.shards, self.world_size)

    def _check_behind(self, shard: int) -> None:
        try:
            self.arrays.verify([shard])
        except UserError as error:
            raise UserError(f"{error}; checkpoints since this start may have learned from it") from error

    def batches(self, consumed: int, batch_size: int) -> Generator[dict[str, Tensor], None, None]:
        """Endless batches from global sample `consumed` on; `{"text": int64 [b, T], "codes": int64 [b, N]}`.

        b = batch_size / ranks; rank r gets samples [r * b, (r + 1) * b) of each global batch. Codes are those of all
        levels, coarse to fine, each counted from 0. Of several crops of an image each epoch takes another.

        Raises:
            UserError: the number of ranks does not divide `batch_size`, or an array is damaged.
        """
        share = samples_per_process(batch_size, self.world_size)
        return load(self._batches(consumed + self.rank * share, batch_size, share))

    def _batches(self, start: int, stride: int, share: int) -> Generator[dict[str, Tensor], None, None]:
        if self._encode_caption is None:
            yield from self._gathered(start, stride, share, None)
            return
        count = min(_MOST_WORKERS, processors() - 1)
        with CaptionWorkers(self._encode_caption, self.seed, count) as workers:
            yield from self._gathered(start, stride, share, workers)

    def _gathered(
        self, start: int, stride: int, share: int, workers: CaptionWorkers | None
    ) -> Generator[dict[str, Tensor], None, None]:
        plan = (self.order.locate(np.arange(at, at + share)) for at in count(start, stride))
        if self.arrays.lie_elsewhere:
            texts = workers is not None
            plan = fetched_ahead(
                plan, lambda batch: self.arrays.blocks(batch[0], texts), _BATCHES_AHEAD, self.arrays.bytes
            )
        for samples, epochs in plan:
            if self._verification is not None:
                self._verification.raise_fault()
            # Neighbours begin with different crops, so that an epoch mixes all of them.
            which = None
            if self._draws:
                which = caption_in_epoch(self.seed, samples, epochs, self.arrays.caption_counts(samples))
            text, codes = self.arrays.gather(samples, (samples + epochs) % self.arrays.crops, which)
            if workers is not None:
                captions = self.arrays.captions(samples, which)
                text[:] = workers.encode(captions, epochs.tolist(), samples.tolist())
            yield {"text": torch.from_numpy(text), "codes": torch.from_numpy(codes)}
