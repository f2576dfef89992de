"""How often each code is used in a whole step, for the losses that ask for even use (lfq.py, gumbel.py).

The loss of a step of several micro-batches is f(q̄) of the mean q̄ over all of them, which none of them knows. So each
takes f's slope at the q̄ of the step before, which differs by one update, and its own part of q̄'s gradient: their sum
is the whole step's. A single micro-batch takes its own q̄.

It belongs to the objective: checkpoints hold it, an exported tokenizer does not.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.core import distributed


class StepMean(nn.Module):
    """Mean posterior [K] of a micro-batch -> the step's, over all ranks, with that micro-batch's gradient."""

    latest: Tensor  # [K], of the step before; zeros before the first

    def __init__(self, codes: int) -> None:
        super().__init__()
        self.micro_batches = 1  # of a step
        self.register_buffer("latest", torch.zeros(codes))
        self._seen: list[Tensor] = []  # of one step, emptied after its update

    def forward(self, mean_K: Tensor) -> Tensor:
        mean_K = distributed.mean_with_gradient(mean_K)
        now = mean_K.detach()
        self._seen.append(now)
        if self.micro_batches == 1:
            return mean_K
        return torch.where(self.latest.sum() > 0, self.latest, now) + (mean_K - now)

    @torch.no_grad()
    def after_update(self, applied: bool | Tensor) -> None:
        """Keep the step's mean, if its update was `applied`."""
        seen, self._seen = self._seen, []
        if seen:
            mean = torch.stack(seen).mean(0)
            self.latest.copy_(torch.where(torch.as_tensor(applied), mean, self.latest))
