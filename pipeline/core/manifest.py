"""The record that vouches for finished work: size and SHA-256 of every file, written last and checked before use.

write_json(folder / "manifest.json", {name: record(folder / name) for name in names})
fault = first_fault(folder, read_json(folder / "manifest.json"))
if fault:
    raise UserError(f"{fault}: restore it, or run the stage again")
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired, TypedDict

from pipeline.core.atomic_io import sha256_file


class FileRecord(TypedDict):
    """What is recorded of a file."""

    bytes: NotRequired[int]  # some formats on disk record the hash alone
    sha256: str


@dataclass(frozen=True)
class Fault:
    """A file that is not as recorded."""

    path: Path
    expected: str  # "12 bytes", "sha256 0123456789ab"
    found: str  # likewise, or "no file"

    def __str__(self) -> str:
        return f"{self.path}: expected {self.expected}, found {self.found}"


def record(path: Path, sha256: str | None = None) -> FileRecord:
    """The record of a file that is there. `sha256`: its hash, where that is known already."""
    return {"bytes": path.stat().st_size, "sha256": sha256 or sha256_file(path)}


def first_fault(directory: Path, files: Mapping[str, FileRecord], *, hashed: bool = True) -> Fault | None:
    """The first file that is missing, of another size or of another content than recorded; None: all are as recorded.

    Args:
        directory: the folder that names are relative to.
        files: the record of each file, by name.
        hashed: compare hashes, too, which reads the files; sizes are always compared.
    """
    return next((fault for name in files if (fault := _fault(directory / name, files[name], hashed))), None)


def _fault(path: Path, recorded: FileRecord, hashed: bool) -> Fault | None:
    size = recorded.get("bytes")
    if not path.is_file():
        return Fault(path, _sha256(recorded["sha256"]) if size is None else f"{size} bytes", "no file")
    if size is not None and (found := path.stat().st_size) != size:
        return Fault(path, f"{size} bytes", f"{found} bytes")
    if hashed and (sha256 := sha256_file(path)) != recorded["sha256"]:
        return Fault(path, _sha256(recorded["sha256"]), _sha256(sha256))
    return None


def _sha256(digest: str) -> str:
    return f"sha256 {digest[:12]}"
