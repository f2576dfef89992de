"""The loader of both streams: a thread makes batches ahead of their use, and puts them on this process's device.

    batches = load(made_on_the_host)     # a generator of {"text": uint16 [b, T], …}, ids as narrow as they lie on disk
    for batch in batches: …              # on the device, ids as int64
    batches.close()                      # ends the thread

On a GPU the batches travel narrow, from pinned memory, on a stream of their own: the training thread and its stream
wait for nothing that is there already.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Generator
from contextlib import closing
from typing import TypeVar

import torch
from torch import Tensor

from pipeline.core import distributed

T = TypeVar("T")
U = TypeVar("U")
Batch = dict[str, Tensor]
log = logging.getLogger(__name__)

_BATCHES_AHEAD = 4
_PATIENCE_S = 10.0  # that a thread has to end, once it is not needed any more
_IDS = (torch.uint16, torch.uint32, torch.int32)


def load(
    batches: Generator[Batch, None, None], device: torch.device | None = None, count: int = _BATCHES_AHEAD
) -> Generator[Batch, None, None]:
    """`batches`, made by a thread up to `count` ahead of their use, on `device` (None: this process's); see `ahead`.

    Ids of 16 and 32 bits become int64; all else keeps its type.
    """
    device = distributed.device() if device is None else device
    if device.type == "cuda":
        return _by_side_stream(batches, device, count)
    return ahead(_each(_widened, batches), count)


def _by_side_stream(
    batches: Generator[Batch, None, None], device: torch.device, count: int
) -> Generator[Batch, None, None]:
    side = torch.cuda.Stream(device)

    def sent(batch: Batch) -> tuple[Batch, torch.cuda.Event]:
        with torch.cuda.stream(side):
            there = {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in batch.items()}
            return there, side.record_event()

    def all_sent() -> Generator[tuple[Batch, torch.cuda.Event], None, None]:
        torch.cuda.set_device(side.device)  # a thread begins on GPU 0, and would take memory there for a context
        yield from _each(sent, batches)

    with closing(ahead(all_sent(), count)) as coming:
        for batch, arrived in coming:
            here = torch.cuda.current_stream(device)
            here.wait_event(arrived)
            for tensor in batch.values():
                tensor.record_stream(here)  # its memory is the side stream's, and must not be used again too early
            yield _widened(batch)


def _widened(batch: Batch) -> Batch:
    return {name: tensor.long() if tensor.dtype in _IDS else tensor for name, tensor in batch.items()}


def _each(change: Callable[[T], U], items: Generator[T, None, None]) -> Generator[U, None, None]:
    with closing(items):
        for item in items:
            yield change(item)


def ahead(items: Generator[T, None, None], count: int) -> Generator[T, None, None]:
    """`items`, made by a thread up to `count` ahead of their use; closed when this is. Raises what `items` raises.

    A thread that does not end (it may hang in a read of a dead file system) is left behind after ten seconds, with a
    warning: a training that is asked to stop must not hang with it.
    """
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
        finally:
            items.close()

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
        thread.join(_PATIENCE_S)
        if thread.is_alive():
            log.warning("the thread that reads data does not end: is its file system reachable?")
