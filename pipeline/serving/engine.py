"""The thread that draws codes for all requests at once.

    engine = Engine(pipeline, slots=16, waiting=32); engine.start()
    engine.submit(order)            # joins at the next code, if its images fit; else it waits; else Refusal
    order.cancel()                  # its client is gone: its rows leave before the next code
    engine.stop()                   # what runs is finished, what waits is refused; then join()
    engine.failed                   # it cannot draw any more, and has refused all: end the process

One thread draws (`RowBatch`, or `PassBatch` for models of order any and scale), one makes files of codes
(`Finisher`), so that neither waits for the other.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque

import torch

from pipeline.sampling.decode import candidate_uniforms, numbers_per_image
from pipeline.sampling.pass_batch import PassBatch
from pipeline.sampling.pass_decode import draws_in_passes
from pipeline.sampling.pipeline import Pipeline
from pipeline.sampling.row_batch import Joining, RowBatch
from pipeline.serving.counts import Counts
from pipeline.serving.finish import Finisher
from pipeline.serving.order import Failed, Order
from pipeline.serving.refusal import broken, busy, stopping, too_slow

log = logging.getLogger(__name__)


class Engine:
    """One model, any number of orders."""

    def __init__(self, pipeline: Pipeline, slots: int, waiting: int, timeout_s: float, counts: Counts) -> None:
        """`slots`: rows that are drawn at once, two for a guided image; `waiting`: orders that may wait for some."""
        self.pipeline, self.slots, self._waiting, self._timeout_s = pipeline, slots, waiting, timeout_s
        self._counts = counts
        self._queue: deque[Order] = deque()
        self._running: list[Order] = []
        self._batch = self._new_batch()
        self._changed, self._stopping, self.failed = threading.Condition(), False, False
        self._seconds = 1.0  # that the last order took
        self.finisher = Finisher(pipeline)
        self._thread = threading.Thread(target=self._work, name="draw", daemon=True)
        counts.watch(waiting=lambda: len(self._queue), drawn=self._drawn)

    def start(self) -> None:
        self._thread.start()

    def submit(self, order: Order) -> None:
        """Put it in line. Raises Refusal: the line is full, or the server ends."""
        with self._changed:
            if self.stopping:
                raise stopping()
            self._queue = deque(waits for waits in self._queue if not waits.cancelled)
            if len(self._queue) >= self._waiting:
                raise busy(self._seconds * len(self._queue) / max(len(self._running), 1))
            self._queue.append(order)
            self._changed.notify()

    @property
    def stopping(self) -> bool:
        """It takes no orders: it was asked to stop, or nobody draws."""
        return self._stopping or not self._thread.is_alive()

    def stop(self) -> None:
        """Finish what runs, refuse what waits."""
        with self._changed:
            self._stopping = True
            refused, self._queue = list(self._queue), deque()
            self._changed.notify()
        for order in refused:
            order.emit(Failed(stopping()))

    def join(self, timeout_s: float) -> None:
        """Wait until all is finished."""
        self._thread.join(timeout_s)
        self.finisher.close()

    def _new_batch(self) -> RowBatch | PassBatch:
        model = self.pipeline.fastest(self.pipeline.transformer)
        return PassBatch(model, self.slots) if draws_in_passes(model) else RowBatch(model, self.slots)

    def _drawn(self) -> int:
        """Images that are being drawn; for other threads, which find no batch while one is made anew."""
        return sum(not row.finished for order in self._running for row in order.rows)

    def _work(self) -> None:
        try:
            while self._wait():
                self._turn_or_begin_anew()
        except Exception:
            log.exception("drawing failed again while it was begun anew")
            self.failed = True
            self.stop()

    def _turn_or_begin_anew(self) -> None:
        """A turn; if it fails, those that run are answered, and a batch is made. Raises what that one raises."""
        try:
            self._turn()
        except Exception:
            log.exception("drawing failed; %d requests are answered with an error", len(self._running))
        else:
            return
        # Only here, where no traceback holds the old batch: there may be no memory for two.
        failed, self._running = self._running, []
        for order in failed:
            order.emit(Failed(broken()))
        del self._batch
        if self.pipeline.transformer.head.weight.is_cuda:
            torch.cuda.empty_cache()
        self._batch = self._new_batch()

    def _wait(self) -> bool:
        """Until there is something to draw; False: that was all."""
        with self._changed:
            while not self._queue and not self._running:
                if self._stopping:
                    return False
                self._changed.wait()
        return True

    def _turn(self) -> None:
        """Those that are gone leave, those that wait join, and all advance by a code, or a pass."""
        self._let_leave()
        admitted = self._admitted()
        self._running += admitted  # first: whatever goes wrong, all of them are answered
        if admitted:
            self._join(admitted)
        finished = False
        if rows := self._batch.rows:
            before = sum(row.index for row in rows)
            finished = bool(self._batch.step())
            self._counts.drew(sum(row.index for row in rows) - before)
        told = self._running if admitted or finished else [one for one in self._running if one.partial_images]
        for order in told:
            self._tell(order)
        if admitted or finished:
            self._running = [order for order in self._running if not all(row.finished for row in order.rows)]

    def _let_leave(self) -> None:
        now = time.monotonic()
        gone = [order for order in self._running if order.cancelled or order.deadline < now]
        if gone:
            self._batch.leave([row for order in gone for row in order.rows])
            self._running = [order for order in self._running if order not in gone]
        with self._changed:
            late = [order for order in self._queue if order.cancelled or order.deadline < now]
            if late:
                self._queue = deque(order for order in self._queue if order not in late)
        for order in gone + late:
            order.emit(Failed(too_slow(self._timeout_s)))

    def _admitted(self) -> list[Order]:
        """Who joins now, in the order of their coming."""
        free, admitted = self._batch.free, []
        with self._changed:
            while self._queue and self._queue[0].slots <= free:
                free -= self._queue[0].slots
                admitted.append(self._queue.popleft())
        return admitted

    def _join(self, admitted: list[Order]) -> None:
        """All of them at once: their prompts are read in one pass."""
        count = numbers_per_image(self.pipeline.transformer)
        joining = [
            Joining(
                order.text,
                torch.stack([candidate_uniforms(order.seed, 0, j, count) for j in range(order.n)]),
                order.sampling,
                order.known,
            )
            for order in admitted
        ]
        for order, rows in zip(admitted, self._batch.join(joining), strict=True):
            order.rows, order.started = rows, time.monotonic()

    def _tell(self, order: Order) -> None:
        """Of its images, once they are there, or of how far they are."""
        if all(row.finished for row in order.rows):
            self._seconds = time.monotonic() - order.started
            self.finisher.finish(order)
            return
        total = order.rows[0].count
        due = total * (order.partials + 1) // (order.partial_images + 1)
        if order.partials < order.partial_images and order.rows[0].index >= due:
            order.partials += 1
            self.finisher.show(order)
