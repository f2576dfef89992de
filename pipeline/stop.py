"""The asked-to-stop flag: SIGTERM, SIGINT and SIGUSR2 set it and do nothing else.

The training loop reads it at step boundaries, where all ranks agree on it; long loops of other
stages read it between units of work. See ARCHITECTURE.md, "Stopping".
"""

from __future__ import annotations

import signal
from types import FrameType

from pipeline.errors import StoppedOnRequest

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
_requested: str | None = None


def install() -> None:
    """From here on the signals only set the flag. A second Ctrl-C ends the process as usual."""
    for number in _SIGNALS:
        signal.signal(number, _on_signal)


def ignore() -> None:
    """The work is done: a late signal must not turn a finished stage into a failed one."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def requested() -> str | None:
    """The name of the signal that asked this process to stop, or None."""
    return _requested


def check() -> None:
    """Raises StoppedOnRequest if this process was asked to stop. For loops that one process runs alone."""
    if _requested:
        raise StoppedOnRequest(f"stopped by {_requested}")


def _on_signal(number: int, _frame: FrameType | None) -> None:
    global _requested
    if _requested == "SIGINT" and number == signal.SIGINT:
        raise KeyboardInterrupt
    _requested = signal.Signals(number).name
