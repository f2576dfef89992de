"""The record that vouches for finished work: size and SHA-256 of every file, written last and checked before use.

write_json(folder / "manifest.json", {name: record(folder / name) for name in names})
fault = first_fault(folder, read_json(folder / "manifest.json"))
if fault:
    raise UserError(f"{fault}: restore it, or run the stage again")
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired, TypedDict

from pipeline.core import elsewhere
from pipeline.core.atomic_io import fill, sha256_file

BLOCK_BYTES = 1 << 22  # 200 GB have 48,000 of them, 4 MB of manifest
_SIZED_FILES = 4_096  # of a folder; who reads one of more compares its size


class FileRecord(TypedDict):
    """What is recorded of a file: its hash, or one for each block, so that processes can share looking at it."""

    bytes: NotRequired[int]  # some formats on disk record the hash alone
    files: NotRequired[int]  # of a folder, whose `bytes` are those of all; a file beside it has a hash of each
    sha256: NotRequired[str]  # of the whole file, or
    block_bytes: NotRequired[int]
    blocks: NotRequired[list[tuple[int, str]]]  # first byte and SHA-256 of each; of a share not all of them


class Hashed:
    """The record of bytes that come one after the other; of more than a block it has the hash of each block."""

    def __init__(self, block_bytes: int = BLOCK_BYTES) -> None:
        self.size = 0
        self._block_bytes = block_bytes
        self._digest = hashlib.sha256()
        self._done: list[tuple[int, str]] = []

    def update(self, data: memoryview) -> None:
        """Add some bytes."""
        while data:
            start = self.size - self.size % self._block_bytes
            if start == self.size and start:
                self._done.append((start - self._block_bytes, self._digest.hexdigest()))
                self._digest = hashlib.sha256()
            part = data[: start + self._block_bytes - self.size]
            self._digest.update(part)
            self.size += len(part)
            data = data[len(part) :]

    def record(self) -> FileRecord:
        """Of all bytes until now."""
        last = self._digest.hexdigest()
        if not self._done:
            return {"bytes": self.size, "sha256": last}
        blocks = [*self._done, (len(self._done) * self._block_bytes, last)]
        return {"bytes": self.size, "block_bytes": self._block_bytes, "blocks": blocks}


@dataclass(frozen=True)
class Fault:
    """A file that is not as recorded."""

    path: Path
    expected: str  # "12 bytes", "sha256 0123456789ab"
    found: str  # likewise, or "no file"

    def __str__(self) -> str:
        return f"{self.path}: expected {self.expected}, found {self.found}"


def record(path: Path, sha256: str | None = None) -> FileRecord:
    """The record of a file that is there, or of a folder. `sha256`: its hash, where that is known already."""
    if path.is_dir():
        names = _names(path)
        return {"files": len(names), "bytes": sum((path / name).stat().st_size for name in names)}
    return {"bytes": path.stat().st_size, "sha256": sha256 or sha256_file(path)}


def first_fault(directory: Path, files: Mapping[str, FileRecord], *, hashed: bool = True) -> Fault | None:
    """The first file that is missing, of another size or of another content than recorded; None: all are as recorded.

    Args:
        directory: the folder that names are relative to.
        files: the record of each file, by name.
        hashed: compare hashes, too, which reads the files; sizes are always compared.
    """
    return next((fault for name in files if (fault := _fault(directory / name, files[name], hashed))), None)


def _names(folder: Path) -> list[str]:
    """Of the files in a folder, but for those on their way (`atomic_path`)."""
    return [name for name in os.listdir(folder) if not name.startswith(".")]


def _fault_of_folder(path: Path, recorded: FileRecord) -> Fault | None:
    """Files are counted, and unless there are very many, their sizes added up: each is a request to the file system."""
    if not path.is_dir():
        return Fault(path, f"{recorded['files']} files", "no folder")
    names = _names(path)
    if len(names) != recorded["files"]:
        names, recorded = _without_those_elsewhere(path, names, recorded)
    if len(names) != recorded["files"]:
        return Fault(path, f"{recorded['files']} files", f"{len(names)} files")
    if len(names) > _SIZED_FILES:
        return None
    if (size := sum(_size(path / name) or 0 for name in names)) != recorded["bytes"]:
        return Fault(path, f"files of {recorded['bytes']} bytes together", f"{size} bytes")
    return None


def _without_those_elsewhere(path: Path, names: list[str], recorded: FileRecord) -> tuple[list[str], FileRecord]:
    """What has to be there of a folder of which some files, here or not, lie in an object store."""
    stored = elsewhere.read(path.parent)
    if stored is None or path.name not in stored.folders:
        return names, recorded
    of_them = stored.folders[path.name]
    rest: FileRecord = {"files": recorded["files"] - of_them["files"], "bytes": recorded["bytes"] - of_them["bytes"]}
    return [name for name in names if not name.endswith(stored.suffix)], rest


def _fault(path: Path, recorded: FileRecord, hashed: bool) -> Fault | None:
    if "files" in recorded:
        return _fault_of_folder(path, recorded)
    size, found = recorded.get("bytes"), _size(path)
    if found is None:
        return Fault(path, _sha256(recorded.get("sha256", "none")) if size is None else f"{size} bytes", "no file")
    if size is not None and found != size:
        return Fault(path, f"{size} bytes", f"{found} bytes")
    if not hashed:
        return None
    if "blocks" in recorded:
        return _fault_of_blocks(path, recorded["blocks"], recorded["block_bytes"])
    if (sha256 := sha256_file(path)) != recorded.get("sha256"):
        return Fault(path, _sha256(recorded.get("sha256", "none")), _sha256(sha256))
    return None


def _size(path: Path) -> int | None:
    """In bytes, None if there is no such file; asks the file system once."""
    try:
        about = path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # no path has a null
        return None
    return about.st_size if stat.S_ISREG(about.st_mode) else None


def _fault_of_blocks(path: Path, blocks: list[tuple[int, str]], block_bytes: int) -> Fault | None:
    memory = memoryview(bytearray(block_bytes))
    with open(path, "rb", buffering=0) as file:
        for start, expected in blocks:
            file.seek(start)
            if (sha256 := hashlib.sha256(memory[: fill(file, memory)]).hexdigest()) != expected:
                return Fault(path, f"{_sha256(expected)} from byte {start} on", _sha256(sha256))
    return None


def _sha256(digest: str) -> str:
    return f"sha256 {digest[:12]}"
