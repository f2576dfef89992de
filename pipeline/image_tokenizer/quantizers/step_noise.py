"""What training draws for an image: the same in whatever micro-batch, and on whatever rank, it comes (gumbel.py).

Uniform numbers from a generator that is seeded anew for each image, by (seed, step, its place in the whole batch).
torch's global one is each rank's own, and on a GPU other numbers come of it when it fills tensors of another size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.core import distributed
from pipeline.core.seeds import hash63


class StepNoise:
    """Numbers in [0, 1) for the micro-batches of a step, in their order."""

    def __init__(self, *seed: object) -> None:
        """`seed`: equal on all ranks."""
        self._seed = seed
        self._share: int | None = None  # images of this rank's part of a step; None: they come at once
        self._seen = 0

    def __call__(self, like: Tensor, step: int) -> Tensor:
        """Of the shape of `like` [b,...], b images of this rank."""
        begin = distributed.rank() * (self._share or len(like)) + self._seen
        self._seen += len(like)
        # Fake tensors of a GPU that is not there take any generator.
        generator = torch.Generator(like.device if torch.cuda.is_available() else "cpu")
        noise = torch.empty_like(like, memory_format=torch.contiguous_format)
        for place, image in enumerate(noise, begin):
            image.uniform_(generator=generator.manual_seed(hash63(*self._seed, step, place)))
        return noise

    def expect(self, images: int) -> None:
        """A step begins, of so many images on this rank."""
        self._share, self._seen = images, 0

    def forget(self) -> None:
        """The step is over."""
        self._share, self._seen = None, 0
