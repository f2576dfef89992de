"""The asked-to-stop flag: SIGTERM, SIGINT and SIGUSR2 set it and do nothing else.

The training loop reads it at step boundaries, where all ranks agree on it; long loops of other
stages read it between units of work. See ARCHITECTURE.md, "Stopping".
"""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Iterable
from types import FrameType

from pipeline.core.errors import StoppedOnRequest

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
_requested: str | None = None
_when = 0.0


def install() -> None:
    """From here on the signals only set the flag. A second Ctrl-C ends the process as usual."""
    for number in _SIGNALS:
        signal.signal(number, _on_signal)


def ignore() -> None:
    """The work is done: a late signal must not turn a finished stage into a failed one."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def requested() -> str | None:
    """Which signal asked this process to stop, where and when ("SIGUSR2 at 20:15:03 on node1"), or None."""
    if _requested is None:
        return None
    return f"{_requested} at {time.strftime('%H:%M:%S', time.localtime(_when))} on {socket.gethostname()}"


def asked(of_ranks: Iterable[str | None]) -> str:
    """What each rank's `requested()` says, told together: "SIGUSR2 at 20:15:03 on node1 (rank 0, 1)"."""
    ranks: dict[str, list[int]] = {}
    for rank, request in enumerate(of_ranks):
        if request:
            ranks.setdefault(request, []).append(rank)
    return ", ".join(f"{request} (rank {', '.join(map(str, which))})" for request, which in ranks.items())


def check() -> None:
    """Raises StoppedOnRequest if this process was asked to stop. For loops that one process runs alone."""
    if _requested:
        raise StoppedOnRequest(f"stopped by {requested()}")


def _on_signal(number: int, _frame: FrameType | None) -> None:
    global _requested, _when
    if _requested == "SIGINT" and number == signal.SIGINT:
        raise KeyboardInterrupt
    _requested, _when = signal.Signals(number).name, time.time()
