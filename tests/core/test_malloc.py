"""Memory that is freed inside of `gives_back` is the system's again."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from pipeline.core.malloc import gives_back
from tests.launch import ROOT, environment

KEPT, BLOCK = 40, 3 << 20


def _own_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def _still_there(given_back: bool) -> int:
    """MB that are resident after blocks are freed of which the last one is not, in a process at work."""
    del (before := [bytearray(31 << 20)])[:]  # glibc takes larger blocks out of its row from now on
    start = _own_bytes()
    with gives_back() if given_back else nullcontext():
        before += [bytearray(BLOCK) for _ in range(KEPT)]
        del before[:-1]
        return (_own_bytes() - start) // 1_000_000


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="another C library than glibc keeps other things")
def test_blocks_that_are_freed_in_front_of_one_that_stays_go_back_inside_and_do_not_outside() -> None:
    def told(given_back: bool) -> int:
        code = f"from tests.core.test_malloc import _still_there; print(_still_there({given_back}))"
        run = subprocess.run([sys.executable, "-c", code], env=environment(), cwd=ROOT, capture_output=True, check=True)
        return int(run.stdout)

    assert told(given_back=False) > 100
    assert told(given_back=True) < 10
