"""Processes of a training on this machine: they meet on loopback, and one that fails ends the others."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.core.errors import UserError
from pipeline.orchestration import local_runner, side_by_side
from pipeline.orchestration.graph import stage_named
from pipeline.orchestration.local_runner import StopRequest


def test_each_process_knows_its_rank_and_a_place_on_loopback() -> None:
    first, second = local_runner._ranks(2)
    assert (first["RANK"], second["RANK"]) == ("0", "1")
    assert first["MASTER_ADDR"] == "127.0.0.1"
    assert first["LOCAL_WORLD_SIZE"] == first["WORLD_SIZE"] == "2"
    assert first["MASTER_PORT"] == second["MASTER_PORT"]


def test_a_process_that_waits_for_a_dead_one_is_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(side_by_side, "GRACE_S", 0.5)
    monkeypatch.setattr(local_runner.signal, "signal", lambda *_: None)
    runs: Any = SimpleNamespace(path=tmp_path)
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    commands = [[sys.executable, "-c", deaf], [sys.executable, "-c", "raise SystemExit(3)"]]
    with pytest.raises(UserError, match=r"transformer failed \(exit 3\)"):
        local_runner._run_processes(stage_named("transformer"), runs, commands, [{}, {}], StopRequest())


def _stopped() -> subprocess.Popen[bytes]:
    process = subprocess.Popen(["sleep", "60"])
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)  # else what is sent next may come first
    return process


def test_a_stopped_process_hears_that_it_is_to_end_when_another_fails() -> None:
    stopped = _stopped()
    assert side_by_side.wait_for_all([stopped, subprocess.Popen(["false"])], meet=True) == 1
    assert stopped.returncode == -signal.SIGTERM  # and was not killed after the grace


def test_a_stopped_process_hears_that_the_runner_was_asked_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_runner.signal, "signal", lambda *_: None)
    request, stopped = StopRequest(), _stopped()
    request.pass_on_to([stopped])
    request._on_signal(signal.SIGINT, None)
    assert stopped.wait(10) == -signal.SIGTERM


def test_a_launcher_around_smalti_run_is_not_passed_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[dict[str, str]] = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(local_runner.signal, "signal", lambda *_: None)
    monkeypatch.setenv("MASTER_ADDR", "node7")
    monkeypatch.setattr(local_runner, "_run_processes", lambda s, r, c, environments, t: seen.extend(environments))
    config: Any = SimpleNamespace(processes=1)
    local_runner._run_stage(stage_named("transformer"), config, SimpleNamespace(path=tmp_path), StopRequest())  # type: ignore[arg-type]
    assert "RANK" not in seen[0]
    assert "MASTER_ADDR" not in seen[0]


@pytest.mark.parametrize(
    ("visible", "processes", "expected"),
    [
        ("0,1", 2, 2),
        ("0,1", None, 2),
        ("MIG-a,MIG-b,MIG-c", None, 3),
        ("GPU-a", None, 1),
        ("", 4, 4),
        ("-1", 4, 4),
        ("0,1,-1,3", None, 2),
    ],
)
def test_a_training_is_as_many_processes_as_gpus_or_as_were_asked_for(
    visible: str, processes: int | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    config: Any = SimpleNamespace(processes=processes)
    assert local_runner.local_processes(config, stage_named("transformer")) == expected


def test_more_processes_than_gpus_are_refused_for_a_training_and_share_them_in_an_array(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    config: Any = SimpleNamespace(processes=4)
    with pytest.raises(UserError, match="processes: expected at most 2, the GPUs of this machine .* found 4: lower it"):
        local_runner.local_processes(config, stage_named("image-tokenizer"))
    assert local_runner.local_processes(config, stage_named("tokenize")) == 4
