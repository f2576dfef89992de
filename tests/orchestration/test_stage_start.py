"""The start of a stage where inputs have many files: each is looked at once, and never while others wait."""

from __future__ import annotations

import builtins
import io
import threading
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.pipeline import PipelineConfig, load_pipeline
from pipeline.core import lock, manifest, signals
from pipeline.core.errors import StoppedOnRequest, UserError
from pipeline.orchestration import run_directory, stage_run
from pipeline.orchestration.graph import Stage, inputs_of, stage_named
from pipeline.orchestration.run_directory import RunDirectory
from pipeline.slurm.supervisor.__main__ import _stamp
from tests.conftest import TINY
from tests.orchestration.recorded_run import recorded_run

GENERATE = stage_named("generate")


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    monkeypatch.setenv("SMALTI_SUBMITTED", "1")
    return recorded_run(tmp_path)


def _changed(runs: RunDirectory) -> PipelineConfig:
    return load_pipeline(TINY, [f"runs={runs.path.parent}", "generate.sampling.temperature=0.5"])


def test_a_task_looks_at_each_file_and_manifest_once_and_at_none_while_the_start_is_locked(
    runs: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: Counter[str] = Counter()
    opened: Counter[str] = Counter()

    def first_fault(directory: Path, files: Mapping[str, Any], **options: Any) -> object:
        looked[directory.name] += 1
        assert not runs.lock("generate.begin").exists()
        return manifest.first_fault(directory, files, **options)

    really_open = open

    def counted(file: Any, *args: Any, **options: Any) -> Any:
        path = Path(file) if isinstance(file, (str, Path)) else Path()
        opened[path.parent.name] += path.name == "manifest.json"
        return really_open(file, *args, **options)

    monkeypatch.setattr(run_directory, "first_fault", first_fault)
    monkeypatch.setattr(builtins, "open", counted)
    monkeypatch.setattr(io, "open", counted)
    begun = []
    stage_run.execute(GENERATE, _changed(runs), "tiny.yaml", (0, 2), begun.append)
    assert begun
    assert looked == dict.fromkeys(inputs_of(begun[0].config, GENERATE), 1)
    assert max(opened.values()) == 2  # once to hash it, once to read it


def test_a_task_that_finds_the_start_locked_waits_for_it_as_long_as_it_takes(
    runs: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin, turns = RunDirectory.begin_task, []

    def slow(*arguments: Any) -> bool:
        turns.append(threading.active_count())
        lock.time.sleep(0.1)
        return begin(*arguments)

    clock = lock.time.monotonic
    monkeypatch.setattr(RunDirectory, "begin_task", slow)
    monkeypatch.setattr(lock.time, "monotonic", lambda: 1_000 * clock())  # 0.1 s are two minutes
    monkeypatch.setattr(lock, "STALE_AFTER_S", 1e9)
    refused: list[BaseException] = []

    def task(stage: Stage, number: int) -> None:
        try:
            stage_run.execute(stage, _changed(runs), "tiny.yaml", (number, 4), lambda _: None)
        except BaseException as error:
            refused.append(error)

    tasks = [threading.Thread(target=task, args=(GENERATE, number)) for number in range(4)]
    for one in tasks:
        one.start()
    for one in tasks:
        one.join()
    assert not refused
    assert len(turns) == 4


@pytest.mark.parametrize("name", ["generate", "generate.task-0-of-2", "generate.begin", "run"])
def test_a_task_waits_for_any_lock_that_it_finds_taken(
    name: str, runs: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SMALTI_SUBMITTED")  # it opens the run itself
    monkeypatch.setattr(stage_run, "_OPENING_S", 0.0)
    held, waits = lock.Lock(runs.lock(name), "another process's"), Counter[str]()
    pause = lock._pause

    def pause_until_the_tenth(wait_s: float) -> None:
        waits["in all"] += 1
        if waits["in all"] == 10:  # a second, longer than any patience of a process that is no task
            held.__exit__(None, None, None)
        pause(wait_s)

    monkeypatch.setattr(lock, "_pause", pause_until_the_tenth)
    monkeypatch.setattr(lock, "_POLL_S", 0.06)
    held.__enter__()
    begun = []
    stage_run.execute(GENERATE, _changed(runs), "tiny.yaml", (0, 2), begun.append)
    assert begun
    assert waits["in all"] == 10


@pytest.mark.parametrize(("task", "record"), [(None, "_SUCCESS"), ((0, 2), "tasks/0-of-2")])
def test_only_a_stage_that_found_its_work_up_to_date_says_so_to_who_watches_its_record(
    task: tuple[int, int] | None, record: str, runs: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, path = load_pipeline(TINY, [f"runs={runs.path.parent}"]), runs.stage("generate") / record
    runs.finish_task(GENERATE, (0, 2))
    before = _stamp(path)

    def stopped() -> None:
        raise StoppedOnRequest("asked to stop while it waits")

    time.sleep(0.02)  # a file system's clock has ticks
    with monkeypatch.context() as asked, lock.Lock(runs.lock("generate.task-1-of-2"), "another task"):
        asked.setattr(signals, "check", stopped)
        with pytest.raises((StoppedOnRequest, UserError)):  # who is no task does not wait
            stage_run.execute(GENERATE, config, "tiny.yaml", task and (1, 2), lambda _: None)
    assert _stamp(path) == before
    stage_run.execute(GENERATE, config, "tiny.yaml", task, lambda _: pytest.fail("it is up to date"))
    assert _stamp(path) not in (before, None)
