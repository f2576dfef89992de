"""What a stage brings to the training loop."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from PIL import Image
from torch import nn

from pipeline.core.objective import Objective
from pipeline.training.engines.base import Batch


class Workload(Protocol):
    """Objective, batches, validation metrics and image grids of one training."""

    @property
    def objective(self) -> Objective:
        """What the training minimises."""

    @property
    def tokens_per_sample(self) -> int | None:
        """Positions of a sequence; None where samples are no sequences."""

    def batches(self, consumed: int) -> Iterator[Batch]:
        """This rank's slice of each global batch, from global sample `consumed` on, without end."""

    def evaluate(self, objective: nn.Module) -> dict[str, float]:
        """Metrics on the validation split; collective, without gradients, in eval mode."""

    def sample_images(self, objective: nn.Module) -> dict[str, Image.Image]:
        """Image grids for a look; on rank 0 alone."""
