"""How often each code is used in a whole step, for the losses that ask for even use (lfq.py, gumbel.py).

The loss of a step of several micro-batches is f(q̄) of the mean q̄ over all of them, which none of them knows. So before
the first one, all of them pass encoder and quantizers once without gradients (`VQVAEObjective.look_ahead`). Each then
takes f's slope at the step's own q̄, and its own part of q̄'s gradient: their sum is the whole step's. The slope at
the step before, which costs nothing, is another loss: with few positions a code, that of other images.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.core import distributed


class StepMean:
    """Mean posterior [K] of a micro-batch -> the step's, over all ranks, with that micro-batch's gradient."""

    def __init__(self) -> None:
        self._seen: list[Tensor] | None = None  # while it looks ahead
        self._ahead: Tensor | None = None  # [K], of the step that comes

    def __call__(self, mean_K: Tensor) -> Tensor:
        if self._seen is not None:
            self._seen.append(mean_K.detach())
            return mean_K
        if self._ahead is None:  # a step of one micro-batch
            return distributed.mean_with_gradient(mean_K)
        return self._ahead + (mean_K - mean_K.detach())

    def look_ahead(self) -> None:
        """From here on, what it is called with are a step's micro-batches; none of them gets the step's mean."""
        self._seen, self._ahead = [], None

    def settle(self) -> None:
        """Collective: those were all."""
        if self._seen:
            self._ahead = distributed.mean_tensor(torch.stack(self._seen).mean(0))
        self._seen = None

    def forget(self) -> None:
        """The step is over."""
        self._seen = self._ahead = None
