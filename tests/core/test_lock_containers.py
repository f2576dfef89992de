"""Locks between two containers (PID namespaces) whose clocks are ten minutes apart, by real processes."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.launch import environment
from tests.namespaces import namespaces

# Each writer says its name in a journal as fast as it can for as long as it holds the lock.
WRITER = """
import os, sys, time
from pathlib import Path
from pipeline.core import lock
clock, utime = time.time, os.utime
time.time = lambda: clock() + int(sys.argv[3])
os.utime = lambda path, *_: utime(path, (time.time(), time.time()))
lock.HEARTBEAT_S, lock.STALE_AFTER_S = 0.1, 2.0
name, folder = sys.argv[1], Path(sys.argv[2])
(folder / f"{name} tries").touch()
with lock.Lock(folder / "lock", "the journal", wait_s=60), open(folder / "journal", "a", buffering=1) as journal:
    while True:
        journal.write(name + "\\n")
        time.sleep(0.002)
"""


def _writer(name: str, folder: Path, skew_s: int) -> subprocess.Popen[bytes]:
    """A process of its own PID namespace, in which it is process 1. `skew_s`: how wrong its clock is."""
    container = namespaces("--pid", "--fork", "--kill-child", "--mount-proc")
    arguments = [name, str(folder), str(skew_s)]
    return subprocess.Popen([*container, sys.executable, "-c", WRITER, *arguments], env=environment())


def _until(what: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.machine
def test_of_two_containers_one_writes_and_one_that_slept_too_long_writes_nothing_more(tmp_path: Path) -> None:
    journal = tmp_path / "journal"

    def lines() -> Counter[str]:
        return Counter(journal.read_text().split() if journal.exists() else [])

    writers = [_writer("first", tmp_path, 300)]
    try:
        _until(lambda: lines()["first"])
        writers.append(_writer("second", tmp_path, -300))
        _until((tmp_path / "second tries").exists)
        time.sleep(2.5)  # longer than a lock without a beat would last
        assert lines()["second"] == 0
        assert writers[0].poll() is None
        (sleeper,) = psutil.Process(writers[0].pid).children()
        sleeper.send_signal(signal.SIGSTOP)
        _until(lambda: lines()["second"])
        sleeper.send_signal(signal.SIGCONT)
        assert writers[0].wait(30) == 1
        written = journal.read_text().split()
        assert written[written.index("second") :] == ["second"] * (len(written) - written.index("second"))
        assert writers[1].poll() is None
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()
