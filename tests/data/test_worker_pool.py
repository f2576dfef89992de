"""Work in processes starts wherever the temporary folder is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.launch import environment


def test_work_in_processes_starts_with_a_tmpdir_longer_than_a_sockets_path(tmp_path: Path) -> None:
    folder = tmp_path / ("d" * 60) / ("e" * 60)
    folder.mkdir(parents=True)
    code = "from pipeline.data.worker_pool import in_processes as p; print(sorted(p(abs, [-1, 2], 1)))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(TMPDIR=str(folder)), capture_output=True, text=True
    )
    assert done.stdout.strip() == "[1, 2]", done.stderr


def test_a_worker_that_is_killed_ends_the_work_and_the_other_workers_with_it(tmp_path: Path) -> None:
    code = (
        "import signal; from pipeline.data.worker_pool import in_processes as p\n"
        "try: print(list(p(signal.raise_signal, [0] * 500 + [signal.SIGKILL], 4)))\n"
        "except Exception as error: print(type(error).__name__)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=100)
    assert done.stdout.strip() == "BrokenProcessPool", done.stderr
