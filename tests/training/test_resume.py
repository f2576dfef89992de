"""Killed anywhere and run again, a run ends with the same weights; asked to stop, it saves and says so."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from pipeline.core.metric_names import CLOCK_METRICS
from tests.conftest import NO_TRACKING, TINY
from tests.launch import ROOT, command, environment, kill_all, launch, wait_for_end

BEFORE_THE_TRANSFORMER = ("prepare", "text-tokenizer", "image-tokenizer", "tokenize")
# ZeRO-3 with an average: everything is sharded. What is drawn at random depends on the number of processes.
SHARDED = [
    "transformer.deepspeed.zero_stage=3",
    "transformer.training.ema_decay=0.9",
    "transformer.training.precision=fp32",
    "transformer.caption_dropout=0",
    NO_TRACKING,
]


def _start(folder: Path, *overrides: str) -> subprocess.Popen[str]:
    arguments = ["run", str(TINY), f"runs={folder}", NO_TRACKING, *overrides]
    return subprocess.Popen(
        command("pipeline", arguments),
        env=environment(),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def _prepared(tiny_run: Path, folder: Path, *stages: str) -> Path:
    """A run in `folder` of which only these stages are finished, copied from the finished run."""
    run = folder / "tiny"
    run.mkdir(parents=True)
    for name in ("run.json", "config.yaml"):
        shutil.copy(tiny_run / name, run)
    for stage in stages:
        shutil.copytree(tiny_run / stage, run / stage)
    return run


def _wait_for(happened: Callable[[], bool], runner: subprocess.Popen[str], timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert runner.poll() is None, f"the run ended early: {runner.stderr.read() if runner.stderr else ''}"
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.0005)


def _outputs(run: Path, stage: str) -> dict[str, str]:
    """SHA-256 of each output of a finished stage."""
    manifest = json.loads((run / stage / "manifest.json").read_text())
    return {name: entry["sha256"] for name, entry in manifest["outputs"].items()}


def _metrics(run: Path, stage: str) -> list[dict[str, float]]:
    """The lines of metrics.jsonl without what a clock or the machine decides."""
    lines = [json.loads(line) for line in (run / stage / "metrics.jsonl").read_text().splitlines()]
    clock = ("time", "system/", *CLOCK_METRICS)
    return [{name: value for name, value in line.items() if not name.startswith(clock)} for line in lines]


def _killed(folder: Path, stage: str, moment: Callable[[Path], bool], *overrides: str) -> Path:
    """Kill the stage's process when `moment` comes, by SIGKILL, and wait for the runner to say so."""
    runner = _start(folder, *overrides)
    directory = folder / "tiny" / stage
    _wait_for(lambda: moment(directory), runner)
    kill_all(psutil.Process(runner.pid).children(recursive=True))
    _, errors = runner.communicate()
    assert f"{stage} was killed by SIGKILL" in errors
    return folder / "tiny"


def _after_first_checkpoint(directory: Path) -> bool:
    return (directory / "checkpoints" / "step-00000010").exists()


def _during_a_later_save(directory: Path) -> bool:
    return any(path.suffix == ".tmp" and "10" not in path.name for path in (directory / "checkpoints").glob("*"))


def _before_first_checkpoint(directory: Path) -> bool:
    return (directory / "metrics.jsonl").exists() and not (directory / "checkpoints").exists()


@pytest.fixture(scope="module")
def killed_and_resumed(tmp_path_factory: pytest.TempPathFactory, tiny_run: Path) -> Path:
    """One run whose training stages are killed before, during and after a save, and each time started again."""
    folder = tmp_path_factory.mktemp("killed")
    _prepared(tiny_run, folder, "prepare", "text-tokenizer")
    for stage in ("image-tokenizer", "transformer"):
        for moment in (_before_first_checkpoint, _after_first_checkpoint):
            _killed(folder, stage, moment)
        # A save is over in no time: with many of them, one is seen.
        _killed(folder, stage, _during_a_later_save, f"{stage.replace('-', '_')}.training.checkpoint_every=1")
    launch("pipeline", "run", str(TINY), f"runs={folder}", NO_TRACKING)
    return folder / "tiny"


@pytest.fixture(scope="module")
def undisturbed_on_two(tmp_path_factory: pytest.TempPathFactory, tiny_run: Path) -> Path:
    """A run whose transformer two processes have trained without a break, with `SHARDED`."""
    run = _prepared(tiny_run, tmp_path_factory.mktemp("undisturbed"), *BEFORE_THE_TRANSFORMER)
    launch("stages.transformer", "--config", str(run / "config.yaml"), *SHARDED, processes=2)
    return run


@pytest.mark.parametrize("stage", ["image-tokenizer", "transformer"])
def test_killed_before_during_and_after_a_save_ends_with_the_same_bits(
    stage: str, killed_and_resumed: Path, tiny_run: Path
) -> None:
    assert _outputs(killed_and_resumed, stage) == _outputs(tiny_run, stage)
    assert _metrics(killed_and_resumed, stage) == _metrics(tiny_run, stage)


def test_a_killed_runner_takes_its_stage_along_and_the_next_resumes_at_once(tmp_path: Path, tiny_run: Path) -> None:
    _prepared(tiny_run, tmp_path, "prepare", "text-tokenizer")
    runner = _start(tmp_path)
    _wait_for(lambda: _after_first_checkpoint(tmp_path / "tiny" / "image-tokenizer"), runner)
    stage = psutil.Process(runner.pid).children()[0]
    runner.kill()
    runner.communicate()
    wait_for_end([stage], seconds=10)
    config = ["--config", str(tmp_path / "tiny" / "config.yaml"), NO_TRACKING]
    assert "resuming from step" in launch("stages.image_tokenizer", *config)
    assert _outputs(tmp_path / "tiny", "image-tokenizer") == _outputs(tiny_run, "image-tokenizer")


def test_two_processes_killed_in_the_middle_end_with_the_same_bits_and_one_process_with_the_same_losses(
    tmp_path: Path, tiny_run: Path, undisturbed_on_two: Path
) -> None:
    undisturbed, killed = undisturbed_on_two, _prepared(tiny_run, tmp_path / "killed", *BEFORE_THE_TRANSFORMER)
    arguments = ["--config", str(killed / "config.yaml"), *SHARDED]
    launcher = subprocess.Popen(
        command("stages.transformer", arguments, processes=2), env=environment(), cwd=ROOT, stderr=subprocess.DEVNULL
    )
    while not _after_first_checkpoint(killed / "transformer"):
        assert launcher.poll() is None
        time.sleep(0.01)
    kill_all([*psutil.Process(launcher.pid).children(recursive=True), psutil.Process(launcher.pid)])
    launcher.wait()
    (tmp_path / "alone").mkdir()
    alone = Path(shutil.copytree(killed, tmp_path / "alone" / "tiny"))
    assert "resuming from step" in launch("stages.transformer", *arguments, processes=2)
    assert _outputs(killed, "transformer") == _outputs(undisturbed, "transformer")
    assert _metrics(killed, "transformer") == _metrics(undisturbed, "transformer")

    fewer = ["--config", str(alone / "config.yaml"), *SHARDED, "transformer.deepspeed.zero_stage=1"]
    assert "resuming from step" in launch("stages.transformer", *fewer)
    for found, expected in zip(_metrics(alone, "transformer"), _metrics(undisturbed, "transformer"), strict=True):
        assert found == pytest.approx(expected, rel=1e-4)
    assert sorted(_files(alone)) == sorted(_files(undisturbed))


def _files(run: Path) -> list[str]:
    """What a finished transformer stage leaves for people to look at."""
    folder = run / "transformer"
    return [str(path.relative_to(folder)) for kind in ("images", "model") for path in (folder / kind).iterdir()]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_asked_to_stop_saves_and_wants_to_be_run_again(number: signal.Signals, tmp_path: Path, tiny_run: Path) -> None:
    _prepared(tiny_run, tmp_path, "prepare", "text-tokenizer")
    endless = ["image_tokenizer.training.steps=100000", "image_tokenizer.training.checkpoint_every=100000"]
    runner = _start(tmp_path, *endless)
    directory = tmp_path / "tiny" / "image-tokenizer"
    _wait_for(lambda: _before_first_checkpoint(directory), runner)
    os.kill(runner.pid, number)
    _, errors = runner.communicate()
    assert runner.returncode == 75
    assert "run the same command again to resume" in errors
    assert not (directory / "_SUCCESS").exists()
    assert len(list((directory / "checkpoints").iterdir())) == 1


SPINS = """
import signal
def spins_for_ever(number, frame):
    while True:
        pass
signal.signal(signal.SIGUSR1, spins_for_ever)
"""


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGUSR1])  # stopped, and spinning in Python
@pytest.mark.slow
def test_a_process_that_hangs_ends_the_run_with_stacks_and_the_next_one_ends_with_the_same_bits(
    number: signal.Signals, tmp_path: Path, tiny_run: Path, undisturbed_on_two: Path
) -> None:
    run = _prepared(tiny_run, tmp_path, *BEFORE_THE_TRANSFORMER)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SPINS)
    arguments = ["run", str(TINY), "--only", "transformer", f"runs={tmp_path}", "processes=2", *SHARDED]
    with subprocess.Popen(
        command("pipeline", [*arguments, "transformer.training.hang_timeout_s=8"]),
        env=environment(PYTHONPATH=f"{ROOT}:{tmp_path / 'site'}"),
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    ) as runner:
        _wait_for(lambda: _after_first_checkpoint(run / "transformer"), runner)
        ranks = {child.environ()["RANK"]: child for child in psutil.Process(runner.pid).children()}
        ranks["1"].send_signal(number)
        _, told = runner.communicate(timeout=200)
    assert "error: transformer failed (exit " in told  # 70, or 1 of the other one, whose connection is gone
    if number == signal.SIGSTOP:  # the other one waits for it
        assert re.search(r"error: rank 0 hangs: no sign of life for \d+ s, since .+, in \w+, where it waits", told)
        assert "pipeline/training/trainer.py" in (run / "logs/transformer/rank-00000.log").read_text()
    else:
        assert re.search(r"error: rank 1 hangs: no sign of life for \d+ s, since .+, in no collective", told)
        assert "in spins_for_ever" in (run / "logs/transformer/rank-00001.log").read_text()
    assert "resuming from step" in launch("pipeline", *arguments)
    assert _outputs(run, "transformer") == _outputs(undisturbed_on_two, "transformer")


@pytest.mark.parametrize(("stage", "processes"), [("image-tokenizer", 1), ("transformer", 2)])
def test_one_process_asked_to_stop_inside_an_evaluation_stops_all_after_that_batch_and_it_is_done_again(
    stage: str, processes: int, tmp_path: Path, tiny_run: Path, request: pytest.FixtureRequest
) -> None:
    run = _prepared(tiny_run, tmp_path / "stopped", *BEFORE_THE_TRANSFORMER[: 2 if processes == 1 else None])
    arguments = ["--config", str(run / "config.yaml"), *(SHARDED if processes > 1 else [NO_TRACKING])]
    output = launch("tests.training.stopped_evaluation_worker", stage, *arguments, processes=processes)
    assert "stopped at step 20/30: SIGUSR2" in output
    assert [f"rank {rank}: batch 0" in output for rank in range(processes)] == [True] * processes
    assert "batch 1" not in output  # there are two
    assert not [line for line in _metrics(run, stage) if any(name.startswith("val/") for name in line)]
    assert "resuming from step 20" in launch(f"stages.{stage.replace('-', '_')}", *arguments, processes=processes)
    undisturbed: Path = request.getfixturevalue("undisturbed_on_two") if processes > 1 else tiny_run
    assert _outputs(run, stage) == _outputs(undisturbed, stage)
    assert _metrics(run, stage) == _metrics(undisturbed, stage)
    assert sorted(p.name for p in (run / stage / "images").iterdir()) == sorted(
        p.name for p in (undisturbed / stage / "images").iterdir()
    )


@pytest.mark.slow
def test_a_second_process_in_the_same_run_is_refused_and_the_first_continues(tmp_path: Path) -> None:
    first = _start(tmp_path)
    try:
        _wait_for((tmp_path / "tiny" / "locks" / "run.json").exists, first)
        output = launch("pipeline", "run", str(TINY), f"runs={tmp_path}", check=False)
        assert f"error: the run in {tmp_path / 'tiny'} is already being written by process {first.pid}" in output
        assert first.poll() is None
    finally:
        first.kill()
        first.communicate()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of six megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)]).returncode:
        pytest.skip("a file system of its own needs root and the right to mount one")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.machine
def test_a_disk_that_fills_up_gets_one_line_and_the_run_resumes_when_there_is_room(
    small_disk: Path, tiny_run: Path
) -> None:
    run = _prepared(tiny_run, small_disk, "prepare", "text-tokenizer", "image-tokenizer", "tokenize")
    config = ["--config", str(run / "config.yaml"), NO_TRACKING]
    output = launch("stages.transformer", *config, check=False)  # its second checkpoint does not fit
    assert "error: no space left for" in output
    assert "Traceback" not in output
    subprocess.run(["mount", "-o", "remount,size=60m", str(small_disk)], check=True)
    launch("stages.transformer", *config)
    assert _outputs(run, "transformer") == _outputs(tiny_run, "transformer")
