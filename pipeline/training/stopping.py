"""How long an evaluation is, and stop requests: at which steps a training looks, how an evaluation ends early.

    for batch in stoppable(validation_batches):
        …

The training loop saves, and the resumed training evaluates that step again. See ARCHITECTURE.md, "Stopping".
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from pipeline.config.training import TrainingConfig
from pipeline.core import distributed, signals, watchdog

T = TypeVar("T")
log = logging.getLogger(__name__)

_LOOKS_APART_S = 2.0


class LookOut:
    """At which steps the loop waits for the device and looks: whether to stop, and whether steps were finite.

    All ranks must look at the same steps, whatever their clocks say. So each tells in every step how long its steps
    took (`step_s`), and after a look all go by the mean that they read there.
    """

    def __init__(self, every: int) -> None:
        """`every`: steps from one look to the next, at most."""
        self.every = every
        self.step_s = 0.0  # as this rank measured between the two latest looks
        self._due = 0
        self._latest: tuple[float, int] | None = None  # when, step

    def due(self, step: int) -> bool:
        """Whether to look after `step` steps."""
        return step >= self._due

    def looked(self, step: int, mean_step_s: float) -> None:
        """`mean_step_s`: of what all ranks told; 0 while nobody knows, and then the next step is looked at."""
        now = time.monotonic()
        if self._latest and step > self._latest[1]:
            self.step_s = (now - self._latest[0]) / (step - self._latest[1])
        self._latest = (now, step)
        steps = int(_LOOKS_APART_S / mean_step_s) if mean_step_s else 1
        self._due = step + max(1, min(steps, self.every))


def evaluation_batches(training: TrainingConfig, samples: int) -> int:
    """How many batches of a validation split of `samples` an evaluation takes; the log says which share that is."""
    whole = -(-samples // training.batch_size)
    taken = min(whole, training.evaluation_batches)
    if distributed.is_main():
        share = min(samples, taken * training.batch_size)
        log.info("validation: %d of %d samples (%.3g %%), the same each time", share, samples, 100 * share / samples)
    return taken


class EvaluationStopped(Exception):
    """An evaluation ended early, on every rank, because a rank was asked to stop."""


def stop_if_asked() -> None:
    """Collective. Raises EvaluationStopped on every rank when one of them was asked to stop."""
    watchdog.beat()
    asked = float(signals.requested() is not None)
    if distributed.mean({"asked_to_stop": asked})["asked_to_stop"] > 0:
        raise EvaluationStopped


def stoppable(batches: Iterable[T], every: int = 1) -> Iterator[T]:
    """The same batches, with `stop_if_asked` before every `every`-th. Every rank must take as many as the others."""
    for number, batch in enumerate(batches):
        if number % every == 0:
            stop_if_asked()
        yield batch
