"""Every process that comes of a command runs our code: no module that lies in the current folder takes its place."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.conftest import TINY
from tests.data.sample_images import write_folder
from tests.launch import ROOT, environment, launch

NOWHERE = "prepare.source={kind: folder, path: nowhere}"


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """A folder with modules of our names, of a package's and of the standard library's."""
    names = ("stages/__init__.py", "stages/prepare.py", "stages/image_tokenizer.py", "pipeline.py")
    for name in (*names, "yaml.py", "click.py", "multiprocessing.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("print('HIJACKED')\n")
    return tmp_path


def _run(trap: Path, command: Sequence[str], python: Sequence[str] = (sys.executable, "-P"), **extra: str) -> str:
    """What a command in that folder says; by default begun without the current folder on the path."""
    done = subprocess.run(
        [*python, *command], env=environment(**extra), cwd=trap, capture_output=True, text=True, check=False
    )
    assert "HIJACKED" not in done.stdout + done.stderr
    return f"{done.returncode}: {done.stdout}{done.stderr}"


@pytest.mark.slow  # a run, and its stage
def test_the_stage_of_a_local_run_is_ours(trap: Path) -> None:
    told = _run(trap, ["-m", "pipeline", "run", str(TINY), NOWHERE, "--only", "prepare"])
    assert told.startswith("2: ")
    assert "nowhere" in told


@pytest.mark.slow  # two ranks that import torch
def test_the_ranks_of_a_training_are_ours(trap: Path) -> None:
    told = _run(trap, ["-m", "pipeline", "run", str(TINY), "--only", "image-tokenizer", "processes=2"])
    assert told.startswith("2: ")
    assert "image-tokenizer: its inputs are out of date" in told


@pytest.mark.slow  # a server of processes
def test_the_worker_processes_of_a_command_are_ours(trap: Path) -> None:
    (trap / "bin").mkdir()
    (trap / "bin/smalti").write_text("from pipeline.__main__ import main; main()")  # as pip writes it
    write_folder(trap / "images", 12)
    source = "prepare.source={kind: folder, path: images}"
    more = ["prepare.workers=2", "prepare.shard_size=4", "prepare.validation_fraction=0.3", "tracking.enabled=false"]
    command = ["bin/smalti", "prepare", "--config", str(TINY), source, *more]
    assert _run(trap, command, python=[sys.executable]).startswith("0: ")


@pytest.mark.slow  # `smalti submit --dry-run`, and a stage
def test_a_job_file_starts_our_stages(trap: Path) -> None:
    (trap / "cluster.yaml").write_text("default: {time: '60'}\n")
    launch("pipeline", "submit", str(TINY), f"runs={trap}", "--cluster", str(trap / "cluster.yaml"), "--dry-run")
    lines = (trap / "tiny/slurm/dry-run/prepare.sbatch").read_text().splitlines()
    setting = [line for line in lines if line.startswith(("code=", "export PYTHONPATH="))]
    assert len(setting) == 2
    (trap / "tiny/code").mkdir()
    (trap / "tiny/code/src").symlink_to(ROOT)
    stage = f"exec {sys.executable} -m stages.prepare --config {TINY} '{NOWHERE}' runs={trap}/other"
    told = _run(trap, ["-c", "\n".join([*setting, stage])], python=["bash"], PYTHONPATH="")
    assert told.startswith("2: ")
    assert "nowhere" in told


@pytest.mark.parametrize("stage", ["prepare", "tokenize", "transformer"])
def test_a_stage_that_is_started_by_its_file_says_how_it_is_started(stage: str, trap: Path) -> None:
    told = _run(trap, [str(ROOT / "stages" / f"{stage}.py"), "--help"], python=[sys.executable])
    assert told == "1: error: stages are modules: run `python -m stages.NAME` (or `python -P stages/NAME.py`)\n"
