"""The best evaluation of a training so far (`training.keep_best`): its step and value, a part of each checkpoint.

best = best.after(keep_best, {"val/loss": 3.2}, step=400)     # once an evaluation
best.step                                                     # the checkpoint that stays, and becomes model/
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.config.training import KeepBestConfig, TrainingConfig
from pipeline.core import distributed
from pipeline.core.errors import UserError
from pipeline.training.checkpoint import Checkpoints

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Best:
    """Where and how good the best evaluation was, and how many came after it."""

    step: int = 0  # 0: none yet
    value: float | None = None
    evaluations_since: int = 0

    def after(self, keep: KeepBestConfig, found: Mapping[str, float], step: int) -> Best:
        """Collective: the best once the evaluation after `step` steps has `found` these metrics, by rank 0's values.

        A metric that is not finite is never the best, and of equal ones the first is.

        Raises:
            UserError: the evaluation has no metric of that name.
        """
        if keep.metric not in found:
            raise UserError(
                f"training.keep_best.metric: expected a metric of the evaluations, found {keep.metric!r}: set one of"
                f" {', '.join(sorted(found))}"
            )
        value = distributed.broadcast_object(found[keep.metric])
        sign = 1 if keep.mode == "min" else -1
        if math.isfinite(value) and (self.value is None or sign * value < sign * self.value):
            return Best(step, value)
        return replace(self, evaluations_since=self.evaluations_since + 1)

    def gave_up(self, keep: KeepBestConfig | None) -> bool:
        """Whether as many evaluations as `patience` allows were no better."""
        return bool(keep and keep.patience and self.evaluations_since >= keep.patience)

    def metrics(self, keep: KeepBestConfig) -> dict[str, float]:
        """For the line of the evaluation; nothing while there is no best one."""
        return {} if self.value is None else {"best/step": self.step, f"best/{keep.metric}": self.value}


def still_there(best: Best, checkpoints: Checkpoints, stage: str, step: int) -> Best:
    """Collective, after a resume at `step`: `best`, or none, with a warning, where its checkpoint is not usable."""
    if best.step in (0, step) or not (fault := checkpoints.damage(best.step)):
        return best
    if distributed.is_main():
        log.warning("%s: the best checkpoint, %s, is not usable (%s)", stage, checkpoints.path(best.step), fault)
    return Best()


def result_checkpoint(best: Best, training: TrainingConfig, checkpoints: Checkpoints, stage: str, step: int) -> Path:
    """Collective, after the last step: the checkpoint whose weights are the result. A line of the log says which.

    Raises:
        UserError: the best one is damaged.
    """
    last, keep = checkpoints.path(step), training.keep_best
    if keep is None:
        return last
    if best.value is None:
        log.warning("%s: no best %s is known: the result is that of the last step", stage, keep.metric)
        return last
    path = checkpoints.path(best.step)
    if best.step != step and (fault := checkpoints.damage(best.step)):
        raise UserError(
            f"{path}: expected the best checkpoint, found a damaged one ({fault}): restore it from a backup, or run"
            " the same command again to go on without it"
        )
    if distributed.is_main():
        early = f"; ended early, at step {step} of {training.steps}" if step < training.steps else ""
        found = f"best {keep.metric} {best.value:.6g} at step {best.step}"
        log.info("%s: %s: the result has the weights of that step%s", stage, found, early)
    return path
