"""A process that hangs says where, and ends as a crash; one that is alive is left alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.core.watchdog import HUNG
from tests.launch import ROOT, environment

pytestmark = pytest.mark.slow
BUSY = """
import sys, time
from pathlib import Path
from pipeline.core import watchdog

def stuck_in_a_collective(seconds):
    time.sleep(seconds)

with watchdog.watching(1.5, Path(sys.argv[1])):
    time.sleep(1.8)  # the start is waited for
    for step in range(4):
        watchdog.beat(f"step {step}")
        time.sleep(0.1)
    watchdog.beat("the checkpoint", patient=True)
    stuck_in_a_collective(1.8)
    watchdog.beat("step 9")
    stuck_in_a_collective(float(sys.argv[2]))
time.sleep(1)  # nobody watches any more
"""


def _run(log: Path, hangs_s: float) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BUSY, str(log), str(hangs_s)]
    return subprocess.run(command, env=environment(RANK="3"), cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_a_process_that_hangs_writes_its_stacks_and_ends_as_a_crash(tmp_path: Path) -> None:
    log = tmp_path / "transformer" / "rank-00003.log"
    hung = _run(log, 30)
    assert hung.returncode == HUNG
    assert "stuck_in_a_collective" in log.read_text()
    assert hung.stderr.splitlines() == [
        f"error: rank 3 hangs: no sign of life for 2 s, since step 9, in no collective; where each thread is: {log}"
    ]


WAITS = """
import sys
from pathlib import Path
import torch.distributed as dist
from pipeline.core import watchdog

rank = int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/store", rank=rank, world_size=2)
if rank == 1:
    sys.stdin.read()  # the one that the other waits for
else:
    with watchdog.watching(1.5, Path(sys.argv[1]) / "log"):
        watchdog.beat("step 7")
        dist.all_gather_object([None, None], "here")
"""


def test_a_rank_that_waits_for_another_names_the_collective(tmp_path: Path) -> None:
    commands = [[sys.executable, "-c", WAITS, str(tmp_path), rank] for rank in "01"]
    pipes: dict[str, int] = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE}
    with (
        subprocess.Popen(commands[1], env=environment(RANK="1"), cwd=ROOT, **pipes) as other,
        subprocess.Popen(commands[0], env=environment(RANK="0"), cwd=ROOT, text=True, **pipes) as waiting,
    ):
        _, told = waiting.communicate(timeout=60)
        other.kill()
    assert waiting.returncode == HUNG
    assert "since step 7, in all_gather_object, where it waits for other ranks; where each thread is" in told


def test_a_process_that_beats_is_left_alone(tmp_path: Path) -> None:
    assert _run(tmp_path / "log", 0).returncode == 0
