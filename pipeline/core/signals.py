"""The stop request: a flag that SIGTERM, SIGINT and SIGUSR2 set, and do nothing else.

The training loop reads it at step boundaries, where all ranks agree on it (`requested`); loops of other stages read it
between units of work (`check`). See ARCHITECTURE.md, "Stopping".
"""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Iterable
from types import FrameType

from pipeline.core.errors import StoppedOnRequest

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
_requested: str | None = None  # name of the signal
_requested_at = 0.0  # seconds since the epoch


def install() -> None:
    """Make the signals only set the flag. A second Ctrl-C ends the process as usual."""
    for number in _SIGNALS:
        signal.signal(number, _on_signal)


def ignore() -> None:
    """Make the signals do nothing: when the work is done, a late one must not turn success into failure."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def requested() -> str | None:
    """The signal that asked this process to stop, when and where ("SIGUSR2 at 20:15:03 on node1"), or None."""
    if _requested is None:
        return None
    return f"{_requested} at {time.strftime('%H:%M:%S', time.localtime(_requested_at))} on {socket.gethostname()}"


def describe(requests: Iterable[str | None]) -> str:
    """One line of what `requested()` says on every rank, in their order: "SIGUSR2 at 20:15:03 on node1 (rank 0, 1)"."""
    ranks_of: dict[str, list[int]] = {}
    for rank, request in enumerate(requests):
        if request:
            ranks_of.setdefault(request, []).append(rank)
    return ", ".join(f"{request} (rank {', '.join(map(str, ranks))})" for request, ranks in ranks_of.items())


def check() -> None:
    """Raises StoppedOnRequest if this process was asked to stop. For loops that one process runs alone."""
    if _requested:
        raise StoppedOnRequest(f"stopped by {requested()}")


def _on_signal(number: int, _frame: FrameType | None) -> None:
    global _requested, _requested_at
    if _requested == "SIGINT" and number == signal.SIGINT:
        raise KeyboardInterrupt
    _requested, _requested_at = signal.Signals(number).name, time.time()
