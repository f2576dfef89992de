"""What the training loop has counted since it last looked, kept on the device: a step adds to it and waits for nothing.

    running.add(step, metrics_of_micro_batches, update, asked_to_stop)     # every step
    reading = running.read()                                               # where the loop looks: waits for the device

Sums are float64 and in the order of the steps, so a resume that begins with a checkpoint's sums repeats their bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.core import distributed
from pipeline.training.engines.base import Metrics, Update

_GRADIENT_NORM = "gradient_norm"


@dataclass
class Reading:
    """The counts on the host; the same on every rank."""

    sums: dict[str, float]  # of metrics, averaged over micro-batches and ranks, over the finite steps
    count: int  # finite steps in these sums
    nonfinite_steps: int
    nonfinite_in_a_row: int
    gave_up_at: int  # the step at which the non-finite ones in a row first were as many as allowed; 0: never
    loss: float  # of the latest step
    nonfinite_loss: float  # of the latest step that was not finite
    asked_to_stop: bool  # some rank was
    step_s: float  # mean over ranks of what each said a step takes


class RunningMetrics:
    """Sums and counts of one training. `add` and `read` are collective."""

    def __init__(self, max_nonfinite_steps: int) -> None:
        self._allowed = max_nonfinite_steps
        self._names: list[str] = []
        self._before: dict[str, float] = {}  # sums to begin with
        self._sums = self._tensor((0,))  # [metrics, gradient norm, finite steps]
        self._nonfinite = self._tensor((0, 0))  # [steps in all, in a row]
        self._notes = self._tensor((0, 0))  # [gave up at, loss of the latest that was not finite]
        self._latest = self._tensor((0, 0))  # [metrics, asked to stop (a share of the ranks), seconds a step]
        self._asked = self._tensor((0,))

    def start(self, sums: dict[str, float], count: int, nonfinite_steps: int, nonfinite_in_a_row: int) -> None:
        """Begin with what a checkpoint has, instead of zeros."""
        self._before = sums
        self._sums = self._tensor((count,))
        self._nonfinite = self._tensor((nonfinite_steps, nonfinite_in_a_row))

    def add(self, step: int, found: Sequence[Metrics], update: Update, asked_to_stop: bool, step_s: float) -> None:
        """Count step `step`, 1-based: what its micro-batches found on this rank, and how its update ended.

        Args:
            asked_to_stop: this rank was.
            step_s: how long a step takes, as far as this rank knows.
        """
        if not self._names:
            self._names = [*found[0]]
            before = self._tensor([self._before.get(name, 0.0) for name in (*self._names, _GRADIENT_NORM)])
            self._sums = torch.cat([before, self._sums])
        total = self._stacked(found[0])
        for one in found[1:]:
            total = total + self._stacked(one)
        device = total.device
        said = [torch.full((1,), value, dtype=torch.float64, device=device) for value in (asked_to_stop, step_s, 1)]
        self._latest = distributed.mean_tensor(torch.cat([total / len(found), *said[:2]]))
        self._asked = self._asked + self._latest[-2:-1]
        more = torch.cat([self._latest[:-2], update.gradient_norm.double().view(1), said[2]])
        self._sums = torch.where(update.applied, self._sums + more, self._sums)  # what is skipped may be NaN
        self._count_nonfinite(step, ~update.applied)

    def _count_nonfinite(self, step: int, skipped: Tensor) -> None:
        total, in_a_row = (self._nonfinite + skipped).unbind()
        in_a_row = in_a_row * skipped
        self._nonfinite = torch.stack([total, in_a_row])
        gave_up_at, loss = self._notes.unbind()
        gave_up = (in_a_row >= self._allowed) & (gave_up_at == 0)
        loss = torch.where(skipped, self._latest[0], loss)
        self._notes = torch.stack([gave_up_at.masked_fill(gave_up, step), loss])

    def read(self) -> Reading:
        """The counts until now, once the device has done all that was asked of it."""
        parts = (self._sums, self._nonfinite, self._notes, self._latest, self._asked)
        values = iter(torch.cat(parts).tolist())
        sums, nonfinite, notes, latest, asked = ([next(values) for _ in part] for part in parts)
        named = dict(zip([*self._names, _GRADIENT_NORM], sums[:-1], strict=True)) if self._names else self._before
        return Reading(
            sums=named if sums[-1] else {},
            count=int(sums[-1]),
            nonfinite_steps=int(nonfinite[0]),
            nonfinite_in_a_row=int(nonfinite[1]),
            gave_up_at=int(notes[0]),
            loss=latest[0],
            nonfinite_loss=notes[1],
            asked_to_stop=asked[0] > 0,
            step_s=latest[-1],
        )

    def clear(self) -> None:
        """Begin new sums, after a line was logged."""
        self._before = {}
        self._sums = torch.zeros_like(self._sums)

    def _stacked(self, metrics: Metrics) -> Tensor:
        """float64 [metrics], in the order of names."""
        return torch.stack([metrics[name].detach() for name in self._names]).double()

    @staticmethod
    def _tensor(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=distributed.device())
