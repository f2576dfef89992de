"""When a training saves: every so many steps, or every so many minutes of rank 0's clock."""

from __future__ import annotations

import time

from pipeline.config.training import steps_or_seconds
from pipeline.core import distributed


class SaveInterval:
    """`training.checkpoint_every` of one training. All ranks go by it alike."""

    def __init__(self, checkpoint_every: int | str) -> None:
        self._steps, self._seconds = steps_or_seconds(checkpoint_every)
        self._saved_at = time.monotonic()
        self._late = False

    def looked(self) -> None:
        """Collective: by the clock, learn whether a save is due. Steps need no word between ranks."""
        if self._seconds is not None:
            self._late = distributed.broadcast_object(time.monotonic() - self._saved_at >= self._seconds)

    def due(self, step: int) -> bool:
        """Whether to save after `step` steps."""
        return step % self._steps == 0 if self._steps else self._late

    def saved(self) -> None:
        """A save has begun."""
        self._saved_at = time.monotonic()
        self._late = False
