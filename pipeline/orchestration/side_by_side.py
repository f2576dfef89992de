"""Processes that work on one thing side by side: when one fails, the others end. Knows no torch."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress

GRACE_S = 30.0  # seconds in which the other processes of a training may end by themselves after one failed
# Ctrl-C reaches every process of the terminal, and would end a Python that is still importing with a traceback: who
# starts them passes it on as SIGTERM, and the stage installs its own handlers.
DEAF_TO_CTRL_C = ("/bin/sh", "-c", 'trap "" INT; exec "$@"', "sh")


def ask_to_end(children: Sequence[subprocess.Popen[bytes]]) -> None:
    """SIGTERM to those that run; one that is stopped (SIGSTOP) would not hear it, and is continued."""
    for child in children:
        if child.poll() is None:
            child.terminate()
            child.send_signal(signal.SIGCONT)


def wait_for_all(children: Sequence[subprocess.Popen[bytes]], meet: bool) -> int:
    """Wait until all have ended; the exit code of the first that failed (below 0: a signal's number), else 0.

    One that fails stops the others, who finish their current piece of work.

    Args:
        meet: they meet in collectives, in which the others may wait for the failed one: kill them after the grace.
    """
    waiting, failed, kill_at = list(children), 0, float("inf")
    while waiting:
        with suppress(subprocess.TimeoutExpired):
            waiting[0].wait(timeout=0.2 if len(children) > 1 else None)
        for child in [child for child in waiting if child.poll() is not None]:
            waiting.remove(child)
            if child.returncode and not failed:
                failed = child.returncode
                ask_to_end(waiting)
                if meet:
                    kill_at = time.monotonic() + GRACE_S
        if time.monotonic() > kill_at:
            for other in waiting:
                other.kill()
    return failed
