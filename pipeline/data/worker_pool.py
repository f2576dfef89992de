"""Work in processes, of which only as much is in flight as they need."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import connection
from typing import TypeVar

from pipeline.core import signals
from pipeline.core.errors import StoppedOnRequest

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_processes(work: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Generator[Result, None, None]:
    """`work` of every item, in `workers` processes; yields results in the order of completion.

    When closed early, what is being worked on is finished first.

    Raises:
        BrokenProcessPool: a worker died.
    """
    # forkserver: forking a process that runs threads (trackers, collectives) can deadlock its children.
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker) as pool:
        waiting = iter(items)
        running: set[Future[Result]] = set()
        try:
            while True:
                while len(running) < 2 * workers:
                    try:
                        running.add(pool.submit(work, next(waiting)))
                    except StopIteration:
                        break
                if not running:
                    return
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        except (GeneratorExit, StoppedOnRequest):
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _start_worker() -> None:
    """The parent decides when to stop, between items; a worker whose parent died must not linger."""
    signals.ignore()
    parent = multiprocessing.parent_process()
    if parent is not None:

        def follow() -> None:
            connection.wait([parent.sentinel])
            os._exit(1)

        threading.Thread(target=follow, daemon=True).start()
