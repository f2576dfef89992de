"""Kills at random moments around saves, a few of them: `python -m benchmarks.checkpoints kills` does hundreds."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.launch import launch
from tests.training.test_resume import BEFORE_THE_TRANSFORMER


@pytest.mark.parametrize("processes", [1, 2])
def test_every_kill_leaves_a_complete_checkpoint_and_the_end_is_that_of_an_undisturbed_training(
    processes: int, tiny_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "tiny"
    (run / "logs").mkdir(parents=True)
    for name in ("run.json", "config.yaml"):
        shutil.copy(tiny_run / name, run)
    for stage in BEFORE_THE_TRANSFORMER:
        shutil.copytree(tiny_run / stage, run / stage)
    told = launch("benchmarks.checkpoints", "kills", str(tmp_path), "-n", "3", "-p", str(processes), "--steps", "9")
    assert re.search(r"3 kills .* [1-9] trainings ended, 0 with other bits; 0 faults", told), told
