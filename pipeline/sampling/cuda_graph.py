"""Operations that are captured once as a CUDA graph and replayed: one launch in place of a thousand."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from functools import cache

import torch

log = logging.getLogger(__name__)


class Replayed:
    """Runs functions of no arguments that read and write the same tensors each time, and never wait for the device.

    On CUDA a function runs as it is the first time (which lets libraries set themselves up), is captured the second
    time, and from then on replayed. Elsewhere, and where it cannot be captured, it always runs as it is.
    """

    def __init__(self, device: torch.device) -> None:
        self._capturing = device.type == "cuda"
        self._pool = torch.cuda.graph_pool_handle() if self._capturing else None
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph | None] = {}  # None: has run once

    def __call__(self, key: Hashable, run: Callable[[], object]) -> None:
        """Run `run`, or replay what was captured of the one that had this `key`."""
        if not self._capturing or key not in self._graphs:
            self._graphs[key] = None
            run()
            return
        graph = self._graphs[key] or self._captured(run)
        if graph is None:
            run()
            return
        self._graphs[key] = graph
        graph.replay()

    def _captured(self, run: Callable[[], object]) -> torch.cuda.CUDAGraph | None:
        """A graph of `run`, which has not run by then; None where there can be none."""
        graph = torch.cuda.CUDAGraph()
        try:
            stream = torch.cuda.stream(torch.cuda.current_stream())  # a capture that fails does not go back to it
            with stream, torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                run()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self._capturing = False
            _warn(str(error).splitlines()[0])
            return None
        return graph


@cache
def _warn(reason: str) -> None:
    """Once a process."""
    log.warning(
        "the decode step could not be captured as a CUDA graph (%s): its operations are started one by one, which takes"
        " longer",
        reason,
    )
