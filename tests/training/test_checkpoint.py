"""Checkpoints are atomic; incomplete ones are ignored. (Kills in the middle of a save: test_resume.py.)"""

import logging
import shutil
from pathlib import Path

import pytest

from pipeline.core.errors import UserError
from pipeline.training.checkpoint import Checkpoints


def _save(checkpoints: Checkpoints, step: int) -> Path:
    return checkpoints.save(step, lambda directory: (directory / "weights").write_bytes(bytes([step]) * 1000) and None)


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
