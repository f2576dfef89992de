"""Start real processes the way users do: one, or several under torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]


def environment(**extra: str) -> dict[str, str]:
    """This environment with the project importable, and without a launcher's variables."""
    clean = {name: value for name, value in os.environ.items() if name not in {"RANK", "WORLD_SIZE", "LOCAL_RANK"}}
    return clean | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | extra


def launch(module: str, *arguments: str, processes: int = 1, cwd: Path = ROOT, check: bool = True, **extra: str) -> str:
    """Run `python -m module arguments` to its end; its stdout and stderr."""
    done = subprocess.run(
        command(module, arguments, processes), env=environment(**extra), cwd=cwd, capture_output=True, text=True
    )
    output = done.stdout + done.stderr
    if check and done.returncode:
        raise AssertionError(f"{module} {' '.join(arguments)} ended with {done.returncode}:\n{output[-4000:]}")
    return output


def command(module: str, arguments: Sequence[str], processes: int = 1) -> list[str]:
    python = [sys.executable, "-m"]
    if processes > 1:
        python += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    return [*python, module, *arguments]


def kill_all(processes: Sequence[psutil.Process]) -> None:
    """SIGKILL, and wait until none is alive; one may have ended before, and stay a zombie that nobody waits for."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    wait_for_end(processes)


def wait_for_end(processes: Sequence[psutil.Process], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while alive := [process for process in processes if _is_alive(process)]:
        assert time.monotonic() < deadline, f"still alive after {seconds:.0f} s: {alive}"
        time.sleep(0.01)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
