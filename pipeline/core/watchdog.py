"""A watchdog in each process of a training: one that hangs says where, and ends as a crash, so that the job comes back.

    with watching(600, Path("logs/transformer/rank-00003.log")):
        watchdog.beat("step 1200")                     # all that takes long beats before it, or during it
        watchdog.beat("checkpoint", patient=True)      # waits for other machines, and may take ten times as long, as
                                                       # may all that comes before the first beat

Without a beat for that long, the stacks of all threads go into the file, and the process ends.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TextIO

log = logging.getLogger(__name__)

HUNG = 70  # exit code: neither stopped on request nor a user's mistake, so a crash to whoever started the process
_PATIENCE = 10
_LOOKS = 20  # for each timeout
_COLLECTIVES = os.path.join("torch", "distributed", "distributed_c10d.py")
_GIL_HELD = 1.5  # of the timeout: by then C code that never gives Python back has kept the watchdog from looking, or
# the whole process was stopped for so long, which that timer cannot tell apart: docs/training.md


class _Watchdog:
    def __init__(self, timeout_s: float, file: TextIO) -> None:
        self.timeout_s, self.file = timeout_s, file
        self.latest = time.monotonic()
        self.doing, self.patient = "the start", True  # a large model takes its time to be built
        self.ended = threading.Event()

    def watch(self) -> None:
        looked = time.monotonic()
        while not self.ended.wait(self.timeout_s / _LOOKS):
            before, looked = looked, time.monotonic()
            if looked - before > self.timeout_s / 2:  # the whole process was stopped, and continued in time
                self.latest = looked
            faulthandler.dump_traceback_later(_GIL_HELD * self.timeout_s, exit=True, file=self.file)
            allowed = self.timeout_s * (_PATIENCE if self.patient else 1)
            if time.monotonic() - self.latest > allowed:
                self._end(allowed)
        faulthandler.cancel_dump_traceback_later()

    def _end(self, allowed: float) -> None:
        faulthandler.dump_traceback(self.file)
        collective = _collective()
        log.error(
            "error: rank %s hangs: no sign of life for %.0f s, since %s, %s; where each thread is: %s",
            os.environ.get("RANK", "0"),
            allowed,
            self.doing,
            f"in {collective}, where it waits for other ranks" if collective else "in no collective",
            self.file.name,
        )
        logging.shutdown()
        os._exit(HUNG)


def _collective() -> str | None:
    """The function of torch.distributed that a thread has not come back from."""
    for innermost in sys._current_frames().values():
        called: str | None = None
        frame: FrameType | None = innermost
        while frame is not None:
            if frame.f_code.co_filename.endswith(_COLLECTIVES):
                called = frame.f_code.co_name  # the outermost is what was asked for
            frame = frame.f_back
        if called is not None:
            return called
    return None


_current: _Watchdog | None = None


def beat(doing: str | None = None, patient: bool = False) -> None:
    """This process is alive, and begins `doing` now; None: is still at what it said last."""
    if _current is not None:
        _current.latest = time.monotonic()
        if doing is not None:
            _current.doing, _current.patient = doing, patient


@contextmanager
def watching(timeout_s: float | None, path: Path) -> Iterator[None]:
    """Inside, `timeout_s` without a `beat` end this process, with its stacks at the end of the file; None: nothing."""
    global _current
    if timeout_s is None:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        _current = dog = _Watchdog(timeout_s, file)
        thread = threading.Thread(target=dog.watch, name="watchdog", daemon=True)
        thread.start()
        try:
            yield
        finally:
            _current = None
            dog.ended.set()
            thread.join()


def rank_log(logs: Path, stage: str, rank: int) -> Path:
    """The file that a rank of a stage has for itself in the run's logs."""
    return logs / stage / f"rank-{rank:05d}.log"
