"""What is asked of a file system before work that relies on it. Knows no torch."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

CLOCK_TOLERANCE_S = 10.0  # a lock is stale after 90 s without a heartbeat


def clock_skew_s(folder: Path) -> float:
    """Seconds that this machine's clock is ahead of the one by which the file system of `folder` dates files."""
    probe = folder / f".clock-{socket.gethostname()}-{os.getpid()}"
    probe.write_text("?")
    try:
        return time.time() - probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)
