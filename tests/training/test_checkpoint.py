"""Checkpoints are atomic; incomplete ones are ignored. (Kills in the middle of a save: test_resume.py.)"""

import errno
import json
import logging
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from safetensors.torch import load_file

from pipeline.config.training import steps_or_seconds
from pipeline.core.atomic_io import read_json
from pipeline.core.errors import UserError
from pipeline.core.manifest import FileRecord, record
from pipeline.orchestration.stage_run import StageRun
from pipeline.training import checkpoint, save_interval
from pipeline.training.checkpoint import Checkpoints
from pipeline.training.checkpoint_files import Files, HostCopy
from pipeline.training.save_interval import SaveInterval
from pipeline.training.trainer import resumes
from tests.launch import launch

WEIGHTS = "weights.json"


def _save(checkpoints: Checkpoints, step: int, content: object = None) -> Path:
    checkpoints.save(step, {WEIGHTS: content or [step] * 300})
    checkpoints.finish()
    return checkpoints.path(step)


def _restore(checkpoints: Checkpoints) -> tuple[int | None, int | None]:
    loaded: list[int | None] = [None]
    step = checkpoints.restore(lambda directory: loaded.append(read_json(directory / WEIGHTS)[-1]))
    return step, loaded[-1]


@pytest.fixture(params=[False, True], ids=["waited for", "in the background"])
def checkpoints(request: pytest.FixtureRequest, tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", keep=2, in_background=request.param)


def test_nothing_saved_restores_nothing(checkpoints: Checkpoints) -> None:
    assert _restore(checkpoints) == (None, None)


def test_the_newest_is_restored_and_the_oldest_forgotten(checkpoints: Checkpoints) -> None:
    for step in (1, 2, 3):
        _save(checkpoints, step)
    assert _restore(checkpoints) == (3, 3)
    assert sorted(path.name for path in checkpoints.directory.iterdir()) == ["step-00000002", "step-00000003"]


def test_what_a_killed_save_left_is_ignored(checkpoints: Checkpoints) -> None:
    _save(checkpoints, 1)
    shutil.copytree(checkpoints.directory / "step-00000001", checkpoints.directory / "step-00000002.tmp")
    assert _restore(checkpoints) == (1, 1)
    _save(checkpoints, 2)  # over the leftover
    assert _restore(checkpoints) == (2, 2)


@pytest.mark.parametrize("damage", ["flipped byte", "cut off", "missing file", "missing manifest"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before_with_a_warning(
    checkpoints: Checkpoints, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    _save(checkpoints, 1)
    newest = _save(checkpoints, 2)
    if damage == "flipped byte":
        (newest / WEIGHTS).write_bytes((newest / WEIGHTS).read_bytes().replace(b"2", b"3", 1))
    elif damage == "cut off":
        (newest / WEIGHTS).write_bytes((newest / WEIGHTS).read_bytes()[:10])
    elif damage == "missing file":
        (newest / WEIGHTS).unlink()
    else:
        (newest / "manifest.json").unlink()
    with caplog.at_level(logging.WARNING):
        assert _restore(checkpoints) == (1, 1)
    assert "step-00000002 is not usable" in caplog.text


def test_checkpoints_of_which_none_is_usable_are_an_error_not_a_fresh_start(checkpoints: Checkpoints) -> None:
    (_save(checkpoints, 1) / WEIGHTS).unlink()
    with pytest.raises(UserError, match=r"expected a usable checkpoint in .*, found 1 damaged ones"):
        _restore(checkpoints)


@pytest.mark.parametrize(("keep", "damaged"), [(1, 1), (2, 1), (2, 2), (2, 3)])
def test_after_a_fallback_the_usable_ones_are_kept_and_the_damaged_ones_stand_aside(
    keep: int, damaged: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (100, *range(200, 200 + damaged)):
        _save(Checkpoints(tmp_path, keep=9), step)
    for step in range(200, 200 + damaged):
        (tmp_path / f"step-{step:08d}" / WEIGHTS).write_bytes(b"")
    checkpoints = Checkpoints(tmp_path, keep=keep)
    with caplog.at_level(logging.WARNING):
        assert _restore(checkpoints)[0] == 100
    assert sum("moved aside" in record.message for record in caplog.records) == 1
    _save(checkpoints, 150)  # on the way back, before the step of the damaged ones
    usable = {path.name for path in tmp_path.iterdir() if path.suffix != ".damaged"}
    assert usable == ({"step-00000150"} if keep == 1 else {"step-00000100", "step-00000150"})
    assert len(list(tmp_path.glob("*.damaged"))) == damaged
    assert _restore(checkpoints)[0] == 150


def test_a_damaged_checkpoint_that_cannot_be_moved_aside_does_not_count_as_one_to_keep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    _save(checkpoints, 1)
    (_save(checkpoints, 2) / WEIGHTS).unlink()
    with monkeypatch.context() as patched, caplog.at_level(logging.WARNING):
        patched.setattr(Path, "rename", _refuse)
        assert _restore(checkpoints)[0] == 1
    assert "could not be moved aside" in caplog.text
    _save(checkpoints, 3)
    assert (tmp_path / "step-00000001").exists()


def test_none_usable_moves_none_aside(checkpoints: Checkpoints) -> None:
    (_save(checkpoints, 1) / WEIGHTS).unlink()
    with pytest.raises(UserError):
        _restore(checkpoints)
    assert [path.name for path in checkpoints.directory.iterdir()] == ["step-00000001"]


def _refuse(*_: object, **named: object) -> None:
    if not named.get("ignore_errors"):
        raise OSError(39, "Directory not empty")  # what NFS says while somebody elsewhere has a file of it open


@pytest.mark.parametrize("refused", ["deletion", "renaming"])
def test_an_old_checkpoint_that_cannot_be_deleted_is_a_warning_and_the_next_start_deletes_it(
    refused: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    _save(checkpoints, 1)
    rename = Path.rename
    with monkeypatch.context() as patched, caplog.at_level(logging.WARNING):
        if refused == "deletion":
            patched.setattr(shutil, "rmtree", _refuse)
        else:
            patched.setattr(Path, "rename", lambda a, b: _refuse() if b.suffix == ".trash" else rename(a, b))
        _save(checkpoints, 2)
    assert (
        "could not be deleted ([Errno 39] Directory not empty): the next start of the stage tries again" in caplog.text
    )
    assert _restore(Checkpoints(tmp_path, keep=1))[0] == 2
    _save(checkpoints, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def test_what_killed_processes_left_is_deleted_at_the_next_start(checkpoints: Checkpoints) -> None:
    newest = _save(checkpoints, 1)
    for left in ("step-00000007.tmp", "step-00000009.0a1b2c3d.trash"):
        shutil.copytree(newest, checkpoints.directory / left)
    assert _restore(checkpoints)[0] == 1
    assert [path.name for path in checkpoints.directory.iterdir()] == ["step-00000001"]


def test_saving_a_step_again_leaves_the_first_until_the_second_is_complete(checkpoints: Checkpoints) -> None:
    _save(checkpoints, 1)

    with pytest.raises(TypeError, match="not JSON serializable"):
        _save(checkpoints, 1, object())
    checkpoints = Checkpoints(checkpoints.directory, keep=2)  # that error ends a process
    assert _restore(checkpoints) == (1, 1)
    _save(checkpoints, 1)
    assert _restore(checkpoints) == (1, 1)


@pytest.mark.slow
def test_a_kill_before_any_file_operation_of_saving_a_step_again_leaves_one_of_the_two_and_the_next_start_sees_it(
    tmp_path: Path,
) -> None:
    found, ended = [], False
    while not ended:
        stage = cast(StageRun, SimpleNamespace(directory=tmp_path / str(len(found))))
        directory = stage.directory / "checkpoints"
        _save(Checkpoints(directory, keep=1), 1, [1])
        ended = _saved_in_a_process_that_is_killed(directory, [2], operation=len(found))
        assert resumes(stage)  # or it would draw weights, for the checkpoint to replace
        found.append(_restore(Checkpoints(directory, keep=1)))
        assert [path.name for path in directory.iterdir()] == ["step-00000001"]
    assert found == sorted(found)
    assert found.count((1, 1)) > 3
    assert found.count((1, 2)) > 1  # the last one came to its end


def _saved_in_a_process_that_is_killed(directory: Path, content: object, operation: int) -> bool:
    """Save as a process that kills itself before that file operation; whether it came to its end."""
    left = operation

    def kill(event: str, _: object) -> None:
        nonlocal left
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    if not (child := os.fork()):
        try:
            sys.addaudithook(kill)
            _save(Checkpoints(directory, keep=1), 1, content)
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status == 0


def test_a_checkpoint_of_before_is_readable(checkpoints: Checkpoints) -> None:
    folder = checkpoints.directory / "step-00000001"
    folder.mkdir(parents=True)
    (folder / WEIGHTS).write_bytes(b"[1]")
    sha256 = "080a9ed428559ef602668b4c00f114f1a11c3f6b02a435f0bdc154578e4d7f22"
    (folder / "manifest.json").write_text(
        f'{{"step": 1, "files": {{"{WEIGHTS}": {{"bytes": 3, "sha256": "{sha256}"}}}}}}\n'
    )
    assert _restore(checkpoints) == (1, 1)


def test_a_file_that_no_process_has_recorded_is_an_error(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = checkpoint.write_files

    def write_and_more(directory: Path, files: Files) -> dict[str, FileRecord]:
        (directory.parent / "x").touch()
        return write(directory, files)

    monkeypatch.setattr(checkpoint, "_LISTING_TIMEOUT_S", 0.0)
    monkeypatch.setattr(checkpoint, "write_files", write_and_more)
    with pytest.raises(
        UserError, match=r"expected the 1 files that 1 processes wrote, found 2 \(first difference: x\)"
    ):
        _save(checkpoints, 1)
    assert _restore(checkpoints) == (None, None)


@pytest.mark.parametrize("in_background", [False, True])
@pytest.mark.slow
def test_each_of_two_processes_hashes_and_syncs_what_it_wrote_and_needs_no_fresh_listing(
    in_background: bool, tmp_path: Path
) -> None:
    launch("tests.training.checkpoint_worker", str(tmp_path), str(in_background), processes=2)
    saved = tmp_path / "checkpoints" / "step-00000001"
    manifest = json.loads((saved / "manifest.json").read_text())
    names = [f"{kind}-{rank:05d}.json" for rank in range(2) for kind in ("ema", "training")]
    assert sorted(manifest["files"]) == sorted(names)
    assert all(entry == record(saved / name) for name, entry in manifest["files"].items())
    for rank in range(2):
        outcome = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        assert sorted(outcome["synced"]) == [f"ema-{rank:05d}.json", f"training-{rank:05d}.json"]
        assert outcome["restored"] == 1
        assert outcome["full"].startswith("no space left for")  # the disk of rank 1 alone was full


def test_what_is_saved_in_the_background_is_what_it_was_when_the_save_began(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2, in_background=True)
    weights, running = torch.zeros(1_000_000), {"loss": 0.0}
    for step in (1, 2):
        weights.fill_(step)
        running["loss"] = float(step)
        checkpoints.save(step, {"a.safetensors": {"w": weights}, "b.pt": {"w": [weights]}, "c.json": running})
        weights.fill_(-1)
        running["loss"] = -1.0
    checkpoints.finish()
    for step in (1, 2):
        folder = checkpoints.path(step)
        saved = [load_file(folder / "a.safetensors")["w"], torch.load(folder / "b.pt")["w"][0]]
        assert all(torch.equal(value, torch.full_like(weights, step)) for value in saved)
        assert read_json(folder / "c.json") == {"loss": step}


def test_a_second_copy_takes_no_further_memory() -> None:
    copy, weights = HostCopy(), torch.zeros(10)
    first = copy.of({"a.pt": {"states": [weights, (1, weights.t())]}})["a.pt"]
    weights += 1
    second = copy.of({"a.pt": {"states": [weights, (1, weights.t())]}})["a.pt"]
    assert first["states"][0] is not weights
    assert first["states"][0].data_ptr() == second["states"][0].data_ptr()
    assert second["states"][1][1].tolist() == [1.0] * 10


def test_poll_completes_a_save_without_waiting_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_write, write = Event(), checkpoint.write_files

    def write_later(directory: Path, files: Files) -> dict[str, FileRecord]:
        may_write.wait(60)
        return write(directory, files)

    monkeypatch.setattr(checkpoint, "write_files", write_later)
    checkpoints = Checkpoints(tmp_path, keep=2, in_background=True)
    checkpoints.save(1, {WEIGHTS: [1]})
    for _ in range(3):
        checkpoints.poll()
    assert not checkpoints.path(1).exists()
    may_write.set()
    deadline = time.monotonic() + 60
    while not checkpoints.path(1).exists():
        checkpoints.poll()
        assert time.monotonic() < deadline
    assert _restore(checkpoints) == (1, 1)


def test_a_save_begins_when_the_one_before_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    under_way, write = [0, 0], checkpoint.write_files

    def counted(directory: Path, files: Files) -> dict[str, FileRecord]:
        under_way[0] += 1
        under_way[1] = max(under_way)
        time.sleep(0.05)
        complete = [path.suffix for path in tmp_path.iterdir()].count("")
        assert files[WEIGHTS] == [complete + 1]
        under_way[0] -= 1
        return write(directory, files)

    monkeypatch.setattr(checkpoint, "write_files", counted)
    checkpoints = Checkpoints(tmp_path, keep=9, in_background=True)
    for step in (1, 2, 3):
        checkpoints.save(step, {WEIGHTS: [step]})
    checkpoints.finish()
    assert under_way[1] == 1
    assert _restore(checkpoints) == (3, 3)


def _save_and_poll(checkpoints: Checkpoints) -> None:
    checkpoints.save(2, {WEIGHTS: [2]})
    for _ in range(1000):
        checkpoints.poll()
        time.sleep(0.01)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_refuses_is_one_line_at_the_next_poll_and_the_checkpoint_before_stays(
    number: int, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    _save(checkpoints, 1)

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(checkpoint, "write_files", refuse)
    message = "no space left for .*step-00000002" if number == errno.ENOSPC else "found that the file system refuses"
    with pytest.raises(UserError, match=message) as caught:
        _save_and_poll(checkpoints)
    assert "\n" not in str(caught.value)
    checkpoints.finish()  # nothing is under way any more
    assert _restore(checkpoints) == (1, 1)


def test_the_first_checkpoint_of_each_so_many_steps_stays(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1, keep_every=100)
    for step in (40, 80, 110, 150, 190, 200, 240, 330):
        _save(checkpoints, step)
    assert sorted(int(path.name[-3:]) for path in tmp_path.iterdir()) == [110, 200, 330]


@pytest.mark.parametrize("interval", ["10min", "1.5h", 3, "0s", "10 minutes", 0, "3"])
def test_an_interval_is_steps_or_a_time(interval: int | str) -> None:
    expected = {"10min": (None, 600.0), "1.5h": (None, 5400.0), 3: (3, None)}.get(interval)
    if expected:
        assert steps_or_seconds(interval) == expected
    else:
        with pytest.raises(ValueError, match="expected a number of steps from 1 on, or a time such as 90s"):
            steps_or_seconds(interval)


def test_by_the_clock_a_save_is_due_at_the_first_look_after_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(save_interval.time, "monotonic", lambda: now)
    interval = SaveInterval("1min")
    found = []
    for now, looks in ((50.0, True), (61.0, False), (62.0, True), (63.0, False), (119.0, True)):  # noqa: B007
        if looks:
            interval.looked()
        found.append(interval.due(1))
        if found[-1]:
            interval.saved()
    assert found == [False, False, True, False, False]
