"""One at a time, across hosts, for a moment, by a folder that only one can make; a lock that needs no packages."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_POLL_S = 0.1


@contextmanager
def one_at_a_time(path: Path, stale_after_s: float = 20.0) -> Iterator[None]:
    """Wait for all others that are inside with the same `path`; one that stays for `stale_after_s` was killed there."""
    seen, since = 0, time.monotonic()
    while True:
        with suppress(FileExistsError):
            path.mkdir()
            break
        with suppress(FileNotFoundError):  # it is just leaving
            if (now := path.stat().st_mtime_ns) != seen:
                seen, since = now, time.monotonic()
            elif time.monotonic() - since > stale_after_s:
                path.rmdir()
                continue
        time.sleep(_POLL_S)
    try:
        yield
    finally:
        with suppress(OSError):
            path.rmdir()
