"""Checkpoints are atomic; incomplete ones are ignored. (Kills in the middle of a save: test_resume.py.)"""

import json
import logging
import shutil
from pathlib import Path

import pytest

from pipeline.core.errors import UserError
from pipeline.core.manifest import record
from pipeline.training import checkpoint
from pipeline.training.checkpoint import Checkpoints
from tests.launch import launch


def _save(checkpoints: Checkpoints, step: int) -> Path:
    return checkpoints.save(
        step, lambda directory: (directory / "weights").write_bytes(bytes([step % 256]) * 1000) and None
    )


def _restore(checkpoints: Checkpoints) -> tuple[int | None, bytes]:
    loaded: list[bytes] = [b""]
    step = checkpoints.restore(lambda directory: loaded.append((directory / "weights").read_bytes()))
    return step, loaded[-1][:1]


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", keep=2)


def test_nothing_saved_restores_nothing(checkpoints: Checkpoints) -> None:
    assert _restore(checkpoints) == (None, b"")


def test_the_newest_is_restored_and_the_oldest_forgotten(checkpoints: Checkpoints) -> None:
    for step in (1, 2, 3):
        _save(checkpoints, step)
    assert _restore(checkpoints) == (3, b"\x03")
    assert sorted(path.name for path in checkpoints.directory.iterdir()) == ["step-00000002", "step-00000003"]


def test_what_a_killed_save_left_is_ignored(checkpoints: Checkpoints) -> None:
    _save(checkpoints, 1)
    shutil.copytree(checkpoints.directory / "step-00000001", checkpoints.directory / "step-00000002.tmp")
    assert _restore(checkpoints) == (1, b"\x01")
    _save(checkpoints, 2)  # over the leftover
    assert _restore(checkpoints) == (2, b"\x02")


@pytest.mark.parametrize("damage", ["flipped byte", "cut off", "missing file", "missing manifest"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before_with_a_warning(
    checkpoints: Checkpoints, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    _save(checkpoints, 1)
    newest = _save(checkpoints, 2)
    if damage == "flipped byte":
        (newest / "weights").write_bytes(b"\x02" * 999 + b"\x03")
    elif damage == "cut off":
        (newest / "weights").write_bytes(b"\x02" * 10)
    elif damage == "missing file":
        (newest / "weights").unlink()
    else:
        (newest / "manifest.json").unlink()
    with caplog.at_level(logging.WARNING):
        assert _restore(checkpoints) == (1, b"\x01")
    assert "step-00000002 is not usable" in caplog.text


def test_checkpoints_of_which_none_is_usable_are_an_error_not_a_fresh_start(checkpoints: Checkpoints) -> None:
    (_save(checkpoints, 1) / "weights").unlink()
    with pytest.raises(UserError, match=r"expected a usable checkpoint in .*, found 1 damaged ones"):
        _restore(checkpoints)


@pytest.mark.parametrize(("keep", "damaged"), [(1, 1), (2, 1), (2, 2), (2, 3)])
def test_after_a_fallback_the_usable_ones_are_kept_and_the_damaged_ones_stand_aside(
    keep: int, damaged: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (100, *range(200, 200 + damaged)):
        _save(Checkpoints(tmp_path, keep=9), step)
    for step in range(200, 200 + damaged):
        (tmp_path / f"step-{step:08d}" / "weights").write_bytes(b"")
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
    (_save(checkpoints, 2) / "weights").unlink()
    with monkeypatch.context() as patched, caplog.at_level(logging.WARNING):
        patched.setattr(Path, "rename", _refuse)
        assert _restore(checkpoints)[0] == 1
    assert "could not be moved aside" in caplog.text
    _save(checkpoints, 3)
    assert (tmp_path / "step-00000001").exists()


def test_none_usable_moves_none_aside(checkpoints: Checkpoints) -> None:
    (_save(checkpoints, 1) / "weights").unlink()
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

    def die(_: Path) -> None:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        checkpoints.save(1, die)
    assert _restore(checkpoints) == (1, b"\x01")
    _save(checkpoints, 1)
    assert _restore(checkpoints) == (1, b"\x01")


def test_a_checkpoint_of_before_is_readable(checkpoints: Checkpoints) -> None:
    folder = checkpoints.directory / "step-00000001"
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(b"\x01")
    sha256 = "4bf5122f344554c53bde2ebb8cd2b7e3d1600ad631c385a5d7cce23c7785459a"
    (folder / "manifest.json").write_text(
        f'{{"step": 1, "files": {{"weights": {{"bytes": 1, "sha256": "{sha256}"}}}}}}\n'
    )
    assert _restore(checkpoints) == (1, b"\x01")


def test_a_file_that_no_process_has_recorded_is_an_error(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "_LISTING_TIMEOUT_S", 0.0)
    with pytest.raises(
        UserError, match=r"expected the 0 files that 1 processes wrote, found 1 \(first difference: x\)"
    ):
        checkpoints.save(1, lambda directory: (directory.parent / "x").touch())
    assert _restore(checkpoints) == (None, b"")


@pytest.mark.slow
def test_each_of_two_processes_hashes_and_syncs_what_it_wrote_and_needs_no_fresh_listing(tmp_path: Path) -> None:
    launch("tests.training.checkpoint_worker", str(tmp_path), processes=2)
    saved = tmp_path / "checkpoints" / "step-00000001"
    manifest = json.loads((saved / "manifest.json").read_text())
    names = [f"{kind}-{rank:05d}" for rank in range(2) for kind in ("ema", "training")]
    assert sorted(manifest["files"]) == sorted(names)
    assert all(entry == record(saved / name) for name, entry in manifest["files"].items())
    for rank in range(2):
        outcome = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        assert sorted(outcome["synced"]) == [f"ema-{rank:05d}", f"training-{rank:05d}"]
        assert outcome["restored"] == 1
        assert outcome["full"].startswith("no space left for")  # the disk of rank 1 alone was full
