"""`smalti serve` where memory holds one batch at a time: `python -m tests.serving.short_of_memory serve RUN`.

The first step waits for SIGUSR1 and runs out of memory. With `BATCHES=1` no other batch can be made after it.
"""

from __future__ import annotations

import gc
import os
import signal
import threading
import weakref
from collections.abc import Sequence

import torch

from pipeline.cli.main import main
from pipeline.sampling.row_batch import Row, RowBatch
from pipeline.serving import engine
from pipeline.transformer.model import Transformer

_asked = threading.Event()
_made: list[weakref.ref[RowBatch]] = []


class OneBatch(RowBatch):
    """The only one, as long as it lives."""

    def __init__(self, model: Transformer, slots: int) -> None:
        if str(len(_made)) == os.environ.get("BATCHES") or any(made() is not None for made in _made):
            raise torch.OutOfMemoryError("no memory for a batch")
        super().__init__(model, slots)
        _made.append(weakref.ref(self))

    def step(self) -> Sequence[Row]:
        if len(_made) > 1:
            return super().step()
        _asked.wait()
        raise torch.OutOfMemoryError("no memory for a step")


if __name__ == "__main__":
    gc.disable()  # a cycle would keep the old batch for a while
    signal.signal(signal.SIGUSR1, lambda *_: _asked.set())
    engine.RowBatch = OneBatch  # type: ignore[misc]
    main()
