"""An iterator whose items a thread makes in advance, so that reading and decoding go on beside computing."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator
from typing import TypeVar

T = TypeVar("T")


def ahead(items: Generator[T, None, None], count: int) -> Generator[T, None, None]:
    """`items`, made by a thread up to `count` ahead of their use; closed when this is. Raises what `items` raises."""
    ready: queue.Queue[T | BaseException] = queue.Queue(count)
    stopped = threading.Event()

    def put(item: T | BaseException) -> bool:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            while put(next(items)):
                pass
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=work, name="batches", daemon=True)
    thread.start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, StopIteration):
                return
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join()
        items.close()
