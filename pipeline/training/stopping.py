"""Stop requests inside an evaluation: all ranks end it between the same two batches.

    for batch in stoppable(validation_batches):
        …

The training loop saves, and the resumed training evaluates that step again. See ARCHITECTURE.md, "Stopping".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from pipeline.core import distributed, signals

T = TypeVar("T")


class EvaluationStopped(Exception):
    """An evaluation ended early, on every rank, because a rank was asked to stop."""


def stop_if_asked() -> None:
    """Collective. Raises EvaluationStopped on every rank when one of them was asked to stop."""
    asked = float(signals.requested() is not None)
    if distributed.mean({"asked_to_stop": asked})["asked_to_stop"] > 0:
        raise EvaluationStopped


def stoppable(batches: Iterable[T], every: int = 1) -> Iterator[T]:
    """The same batches, with `stop_if_asked` before every `every`-th. Every rank must take as many as the others."""
    for number, batch in enumerate(batches):
        if number % every == 0:
            stop_if_asked()
        yield batch
