"""The start of a stage where inputs have many files: each is looked at once, and never while others wait."""

from __future__ import annotations

import builtins
import io
import threading
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.pipeline import PipelineConfig, load_pipeline
from pipeline.core import lock, manifest
from pipeline.orchestration import run_directory, stage_run
from pipeline.orchestration.graph import Stage, inputs_of, stage_named
from pipeline.orchestration.run_directory import RunDirectory
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
