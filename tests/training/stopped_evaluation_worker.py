"""A stage whose last process is asked to stop at the first batch of its first evaluation, for test_resume.py."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from pipeline.cli.stage import run_stage
from pipeline.core import distributed
from pipeline.training.stopping import stoppable

T = TypeVar("T")


def signalled(batches: Iterable[T]) -> Iterator[T]:
    for number, batch in enumerate(stoppable(batches)):
        print(f"rank {distributed.rank()}: batch {number}", flush=True)
        if distributed.rank() == distributed.world_size() - 1:
            os.kill(os.getpid(), signal.SIGUSR2)
        yield batch


if __name__ == "__main__":
    name = sys.argv.pop(1)
    stage = importlib.import_module(f"stages.{name.replace('-', '_')}")
    stage.stoppable = signalled  # type: ignore[attr-defined]
    run_stage(name, stage.main)
