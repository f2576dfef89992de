"""The contract between a stage and the training loop."""

from __future__ import annotations

from collections.abc import Generator
from typing import Protocol

from PIL import Image
from torch import nn

from pipeline.core.objective import Objective
from pipeline.training.engines.base import Batch


class Workload(Protocol):
    """Objective, batches, validation metrics and sample images of one training."""

    @property
    def objective(self) -> Objective:
        """The model with its loss."""

    @property
    def tokens_per_sample(self) -> int | None:
        """Length of a sequence; None where samples are no sequences."""

    def batches(self, consumed: int) -> Generator[Batch, None, None]:
        """This rank's slice of each global batch, on its device, from global sample `consumed` on, without end.

        Closed when the training ends. `pipeline.data.prefetch.load` makes batches ahead.
        """

    def data_metrics(self, samples: int) -> dict[str, float]:
        """What the log says of the data when so many samples of the training are consumed."""

    def evaluate(self, objective: nn.Module) -> dict[str, float]:
        """Metrics on the validation split; collective, without gradients, in eval mode.

        Loops over many batches go through `pipeline.training.stopping.stoppable`, to end when a rank is asked to stop.

        Args:
            objective: the engine's `model`, which under ZeRO-3 all ranks must call together.
        """

    def sample_images(self, objective: nn.Module, in_step: bool) -> dict[str, Image.Image]:
        """Named image grids for the log, on rank 0; called on all ranks, without gradients, in eval mode.

        Args:
            objective: not the engine's wrapped model, but the plain one.
            in_step: no rank has the whole model: all must call the same of its modules, as often and in the same order.

        Raises:
            EvaluationStopped: on every rank, when one of them was asked to stop.
        """
