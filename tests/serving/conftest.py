"""One `smalti serve` of the tiny run for all tests of the room, as a user starts it."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.launch import command, environment


@contextmanager
def serving(run: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Its address, and its process."""
    started = command("pipeline", ["serve", str(run), "--port", "0", *options])
    process = subprocess.Popen(started, env=environment(), stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        said = ""
        for line in process.stderr:
            said += line
            if found := re.search(r"open (http://\S+/)", line):
                break
        else:
            raise AssertionError(said)
        yield found[1], process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


@pytest.fixture(scope="session")
def server(tiny_run: Path) -> Iterator[str]:
    """The address of a server that takes one guided image at once, and 20 requests in its queue."""
    with serving(tiny_run, "--slots", "4", "--waiting", "20") as (address, _):
        yield address
