"""A new folder appears whole, or not at all, whatever other processes do at the same place."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.core.errors import UserError
from pipeline.core.writable import new_folder


def test_of_two_that_make_a_folder_at_once_the_first_stands_whole_and_the_second_leaves_nothing(tmp_path: Path) -> None:
    second = new_folder(tmp_path / "step")
    with new_folder(tmp_path / "step") as first:
        (first / "model").write_text("first")
        (second.__enter__() / "model").write_text("half")
        (first / "config").write_text("first")
    with pytest.raises(UserError, match="expected a new or empty folder"):
        second.__exit__(None, None, None)
    assert [path.name for path in tmp_path.iterdir()] == ["step"]
    assert {path.read_text() for path in (tmp_path / "step").iterdir()} == {"first"}
    assert len(list((tmp_path / "step").iterdir())) == 2


def test_a_folder_whose_making_fails_leaves_no_draft(tmp_path: Path) -> None:
    with pytest.raises(KeyError), new_folder(tmp_path / "step") as draft:
        raise KeyError(draft.name)
    assert list(tmp_path.iterdir()) == []


def test_the_draft_of_a_killed_process_goes_with_the_next_one_after_a_day(tmp_path: Path) -> None:
    others = [new_folder(tmp_path / "step") for _ in range(2)]
    killed, alive = (other.__enter__() for other in others)
    os.utime(killed, (0, 0))
    with new_folder(tmp_path / "step"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"step", alive.name}
