"""What this process may use of its machine: processors and open files."""

from __future__ import annotations

import os
import resource
from pathlib import Path

_MANY_FILES = 1 << 20  # stands for "unlimited"
_CGROUP = Path("/sys/fs/cgroup")


def processors() -> int:
    """The processors of this process, at least 1: those that it may run on, by its cgroup's quota where that is less.

    Processes that torchrun or `smalti run` started on one machine share them; under srun each has its own.
    """
    usable = len(os.sched_getaffinity(0))
    if quota := _quota():
        usable = min(usable, max(1, int(quota)))
    return max(1, usable // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def _quota() -> float | None:
    """Processors' worth of time that the cgroup may use, None where there is no limit (cgroup version 2, then 1)."""
    try:
        limit, period = (_CGROUP / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            limit = (_CGROUP / "cpu" / "cpu.cfs_quota_us").read_text().strip()
            period = (_CGROUP / "cpu" / "cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    return int(limit) / int(period) if limit.isdecimal() else None


def open_files() -> int:
    """How many files this process may have open."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return _MANY_FILES if soft == resource.RLIM_INFINITY else soft


def raise_open_files() -> None:
    """Let this process have as many files open as it may allow itself: the hard limit, not the soft one of 1,024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
