"""Work in processes, of which only as much is in flight as they need."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import TypeVar

from pipeline.core import signals
from pipeline.core.errors import StoppedOnRequest, UserError

_LONGEST_TMPDIR = 70  # of the 107 bytes that a socket's path may have; multiprocessing adds two names

Item = TypeVar("Item")
Result = TypeVar("Result")


class _Worker(ForkServerProcess):
    def terminate(self) -> None:
        """From Python 3.12 on a pool of which a worker died calls this and waits; SIGTERM is what workers ignore."""
        self.kill()


class _Workers(ForkServerContext):
    Process = _Worker


def in_processes(work: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Generator[Result, None, None]:
    """`work` of every item, in `workers` processes; yields results in the order of completion.

    When closed early, what is being worked on is finished first.

    Raises:
        BrokenProcessPool: a worker died.
        UserError: TMPDIR is too long for the sockets of multiprocessing, and /tmp cannot be written.
    """
    # forkserver: forking a process that runs threads (trackers, collectives) can deadlock its children.
    _meet_in_a_short_folder()
    with ProcessPoolExecutor(workers, mp_context=_Workers(), initializer=_start_worker) as pool:
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


def _meet_in_a_short_folder() -> None:
    """Where TMPDIR is longer than a socket's path may be, put the sockets of multiprocessing below /tmp."""
    if len(os.fsencode(tempfile.gettempdir())) <= _LONGEST_TMPDIR:
        return
    try:
        folder = tempfile.mkdtemp(prefix="pymp-", dir="/tmp")
    except OSError as error:
        raise UserError(
            f"TMPDIR: expected at most {_LONGEST_TMPDIR} characters, found {tempfile.gettempdir()}: set a shorter one"
        ) from error
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    multiprocessing.current_process()._config["tempdir"] = folder  # type: ignore[attr-defined]


def _start_worker() -> None:
    """The parent decides when to stop, between items; a worker whose parent died must not linger."""
    signals.ignore()
    parent = multiprocessing.parent_process()
    if parent is not None:

        def follow() -> None:
            connection.wait([parent.sentinel])
            os._exit(1)

        threading.Thread(target=follow, daemon=True).start()
