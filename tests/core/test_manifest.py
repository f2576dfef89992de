"""Finished work is what its record says, or the first file that is not is named."""

from io import FileIO
from pathlib import Path

import pytest

from pipeline.core import manifest
from pipeline.core.manifest import FileRecord, Hashed, first_fault, record

NAMES = ("a", "b/c", "d")


@pytest.fixture
def files(tmp_path: Path) -> dict[str, FileRecord]:
    (tmp_path / "b").mkdir()
    for name in NAMES:
        (tmp_path / name).write_text(f"content of {name}")
    return {name: record(tmp_path / name) for name in NAMES}


def test_work_as_recorded_has_no_fault(tmp_path: Path, files: dict[str, FileRecord]) -> None:
    assert first_fault(tmp_path, files) is None


def test_the_first_of_a_missing_a_shorter_and_a_changed_file_is_named(
    tmp_path: Path, files: dict[str, FileRecord]
) -> None:
    (tmp_path / "d").write_text("CONTENT of d")
    assert str(first_fault(tmp_path, files)).startswith(
        f"{tmp_path / 'd'}: expected sha256 {files['d']['sha256'][:12]}"
    )
    (tmp_path / "b" / "c").write_text("short")
    assert str(first_fault(tmp_path, files)) == f"{tmp_path / 'b' / 'c'}: expected 14 bytes, found 5 bytes"
    (tmp_path / "a").unlink()
    assert str(first_fault(tmp_path, files)) == f"{tmp_path / 'a'}: expected 12 bytes, found no file"


def test_sizes_alone_are_compared_without_reading(tmp_path: Path, files: dict[str, FileRecord]) -> None:
    (tmp_path / "a").write_text("CONTENT of a")
    assert first_fault(tmp_path, files, hashed=False) is None
    (tmp_path / "a").write_text("short")
    assert first_fault(tmp_path, files, hashed=False)


def test_a_record_without_sizes_still_finds_a_missing_file(tmp_path: Path, files: dict[str, FileRecord]) -> None:
    hashes: dict[str, FileRecord] = {name: {"sha256": recorded["sha256"]} for name, recorded in files.items()}
    assert first_fault(tmp_path, hashes) is None
    (tmp_path / "a").unlink()
    assert str(first_fault(tmp_path, hashes)).endswith("found no file")


def test_of_a_folder_a_missing_a_shorter_and_another_file_are_told(
    tmp_path: Path, files: dict[str, FileRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = {"b": record(tmp_path / "b")}
    assert folder["b"] == {"files": 1, "bytes": 14}
    (tmp_path / "b" / ".on-its-way.tmp").touch()
    assert first_fault(tmp_path, folder) is None
    (tmp_path / "b" / "c").write_text("short")
    assert str(first_fault(tmp_path, folder)) == f"{tmp_path / 'b'}: expected files of 14 bytes together, found 5 bytes"
    (tmp_path / "b" / "e").write_text("no output")
    assert str(first_fault(tmp_path, folder)) == f"{tmp_path / 'b'}: expected 1 files, found 2 files"
    (tmp_path / "b" / "e").rename(tmp_path / "e")
    monkeypatch.setattr(manifest, "_SIZED_FILES", 0)  # of more, each size is compared by who reads the file
    assert first_fault(tmp_path, folder) is None
    (tmp_path / "b" / "c").unlink()
    assert str(first_fault(tmp_path, folder)) == f"{tmp_path / 'b'}: expected 1 files, found 0 files"


@pytest.mark.parametrize("size", [1, 4, 5, 8, 10])
def test_a_changed_byte_is_found_by_whoever_looks_at_its_block(tmp_path: Path, size: int) -> None:
    content, path, hashed = bytes(range(size)), tmp_path / "file", Hashed(block_bytes=4)
    for start in range(0, size, 3):
        hashed.update(memoryview(content)[start : start + 3])
    recorded = hashed.record()
    path.write_bytes(content)
    assert first_fault(tmp_path, {"file": recorded}) is None
    if size <= 4:
        assert recorded == record(path)
        return
    assert [start for start, _ in recorded["blocks"]] == list(range(0, size, 4))
    for at in range(size):
        path.write_bytes(content[:at] + b"x" + content[at + 1 :])
        for block in recorded["blocks"]:
            fault = first_fault(tmp_path, {"file": {**recorded, "blocks": [block]}})
            assert (fault is not None) == (block[0] == at - at % 4)
            assert fault is None or f"from byte {block[0]} on" in fault.expected


def test_reads_that_give_less_than_was_asked_for_are_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(FileIO):
        """As a network file system may answer a read that a signal interrupts."""

        def read(self, size: int | None = -1, /) -> bytes:
            return super().read(min(size or 7, 7))

        def readinto(self, buffer: memoryview, /) -> int:  # type: ignore[override]
            return super().readinto(buffer[:7])

    hashed = Hashed(block_bytes=100)
    hashed.update(memoryview(bytes(range(250))))
    (tmp_path / "file").write_bytes(bytes(range(250)))
    monkeypatch.setattr(manifest, "open", lambda path, *_, **__: Slow(path), raising=False)
    assert first_fault(tmp_path, {"file": hashed.record()}) is None
