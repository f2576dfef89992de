"""Files are whole or not there."""

import os
from pathlib import Path

import pytest

from pipeline.core.atomic_io import atomic_path, read_json, remove_leftovers, write_atomic, write_json
from pipeline.core.errors import UserError


def test_an_interrupted_write_leaves_the_old_content_and_no_debris(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomic(path, "old")

    def write_half() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("half of the n")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_two_writers_of_one_file_do_not_meet_in_a_temporary_one(tmp_path: Path) -> None:
    # As two array tasks on two hosts may, with the same process id.
    path = tmp_path / "file"
    with atomic_path(path) as first:
        first.write_text("first")
        with atomic_path(path) as second:
            second.write_text("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path: Path) -> None:
    # /dev/full is a real device on which every write fails with ENOSPC.
    path = tmp_path / "file"
    write_atomic(path, "old")

    def write_to_full_disk() -> None:
        with atomic_path(path) as temporary:
            temporary.symlink_to("/dev/full")
            temporary.write_text("new")

    with pytest.raises(UserError, match="no space left for .*file"):
        write_to_full_disk()
    assert path.read_text() == "old"


def test_damaged_json_is_named(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": 1})
    assert read_json(tmp_path / "a.json") == {"x": 1}
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(UserError, match=r"a\.json is damaged: expected JSON"):
        read_json(tmp_path / "a.json")


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    write_atomic(tmp_path / "kept" / "file.tmp", "whole")
    with atomic_path(tmp_path / "kept" / "file") as temporary:
        temporary.write_text("half")
        leftover = temporary.with_name(".other.0.tmp")
        leftover.write_text("of a killed process")
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["file", "file.tmp"]


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_a_file_is_readable_by_whom_the_umask_lets(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        with atomic_path(tmp_path / "file") as temporary:
            os.close(os.open(temporary, os.O_CREAT | os.O_WRONLY, 0o600))  # as safetensors writes
        write_atomic(tmp_path / "other", "content")
    finally:
        os.umask(before)
    assert {(tmp_path / name).stat().st_mode & 0o777 for name in ("file", "other")} == {0o666 & ~umask}
