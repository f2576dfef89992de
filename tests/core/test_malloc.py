"""Memory freed inside of `gives_back` is the system's again; after `keep_freed`, as by trainings, a step has it."""

from __future__ import annotations

import ctypes
import resource
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from pipeline.cli.stage import run_stage
from pipeline.core.malloc import gives_back, keep_freed
from pipeline.orchestration.stage_run import StageRun
from stages import image_tokenizer
from tests.conftest import NO_TRACKING
from tests.launch import ROOT, environment

KEPT, BLOCK = 40, 3 << 20
GLIBC = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="another C library keeps other things")


def _own_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _still_there(given_back: bool) -> int:
    """MB that are resident after blocks are freed of which the last one is not, in a process at work."""
    del (before := [bytearray(31 << 20)])[:]  # glibc takes larger blocks out of its row from now on
    start = _own_bytes()
    with gives_back() if given_back else nullcontext():
        before += [bytearray(BLOCK) for _ in range(KEPT)]
        del before[:-1]
        return (_own_bytes() - start) // 1_000_000


def _faults_of_a_step(kept: bool) -> float:
    """Pages that the system has to give a process each time that it takes blocks and frees them."""
    if kept:
        keep_freed()
    for _ in range(3):
        _step()
    start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        _step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start) / 10


def _step() -> None:
    blocks = [bytearray(BLOCK) for _ in range(KEPT)]
    blocks.append(bytearray(100 << 20))


def _tell_faults_after_a_training() -> None:
    """The stage image-tokenizer, as its arguments say; never returns."""

    def main(run: StageRun) -> None:
        image_tokenizer.main(run)
        print(_faults_of_a_step(kept=False))

    run_stage("image-tokenizer", main)


def _told(expression: str, *arguments: str, tunables: str = "") -> float:
    """What it is in a process of its own; `tunables`: glibc's."""
    code = f"from tests.core import test_malloc; print(test_malloc.{expression})"
    command = [sys.executable, "-c", code, *arguments]
    run = subprocess.run(command, env=environment(GLIBC_TUNABLES=tunables), cwd=ROOT, capture_output=True, check=True)
    return float(run.stdout)


@pytest.mark.machine
@GLIBC
def test_blocks_that_are_freed_in_front_of_one_that_stays_go_back_inside_and_do_not_outside() -> None:
    assert _told("_still_there(given_back=False)") > 100
    assert _told("_still_there(given_back=True)") < 10


@pytest.mark.machine
@GLIBC
@pytest.mark.parametrize("tunables", ["", "glibc.malloc.hugetlb=1"], ids=["pages", "huge-pages"])
def test_a_loop_that_keeps_what_it_freed_asks_the_system_for_nothing_more(tunables: str) -> None:
    given_back = _told("_faults_of_a_step(kept=False)", tunables=tunables)  # fewer where pages are huge
    assert _told("_faults_of_a_step(kept=True)", tunables=tunables) < given_back / 10


@pytest.mark.machine
@GLIBC
def test_a_training_on_a_cpu_keeps_what_its_steps_free(tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "tiny"
    shutil.copytree(tiny_run / "prepare", run / "prepare")
    for name in ("run.json", "config.yaml"):
        shutil.copy(tiny_run / name, run)
    arguments = ["--config", str(run / "config.yaml"), "image_tokenizer.training.steps=6", NO_TRACKING]
    given_back = _told("_faults_of_a_step(kept=False)")
    assert _told("_tell_faults_after_a_training()", *arguments) < given_back / 10
