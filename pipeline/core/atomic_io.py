"""Atomic files, which are either whole or not there: temporary name, fsync, rename, fsync of the folder."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

from pipeline.core.errors import UserError


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, which is renamed to `path` when the block ends without error.

    Raises:
        UserError: the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Process ids repeat from host to host, and two may write the same file.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        set_mode_by_umask(temporary)
        fsync_file(temporary)
        temporary.replace(path)
        fsync_directory(path.parent)
    except BaseException as error:
        full = is_full(path.parent, error)  # before the half-written file makes room again
        temporary.unlink(missing_ok=True)
        if full:
            raise no_space(path) from error
        raise


def set_mode_by_umask(path: Path) -> None:
    """Let a file be read by whom the user's umask lets: safetensors, for one, writes for the user alone."""
    if not path.is_symlink():
        path.chmod(0o666 & ~_umask())


def _umask() -> int:
    try:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1], 8) for line in status.splitlines() if line.startswith("Umask:"))
    except (OSError, StopIteration, ValueError):  # no Linux: it can only be read by setting it
        found = os.umask(0o077)
        os.umask(found)
        return found


def remove_leftovers(directory: Path) -> None:
    """Remove the temporary files of `atomic_path` that killed processes left anywhere under `directory`.

    Call it only where no other process writes.
    """
    for leftover in directory.rglob(".*.tmp"):
        leftover.unlink()


def is_full(directory: Path, error: BaseException) -> bool:
    """Whether `error` is that of a full disk. Libraries in C++ hide the reason, so the disk is asked, too."""
    full = (errno.ENOSPC, errno.EDQUOT)
    if (refusal := os_error(error)) is not None:
        return refusal.errno in full or shutil.disk_usage(directory).free < 1 << 20
    if any(f"(os error {number})" in str(error) for number in full):  # as Rust says it, safetensors for one
        return True
    return isinstance(error, RuntimeError) and shutil.disk_usage(directory).free < 1 << 20


def os_error(error: BaseException) -> OSError | None:
    """The refusal of the system that is behind `error`, which libraries hide behind one of their own; None: none is."""
    behind: BaseException | None = error
    while behind is not None and not isinstance(behind, OSError):
        behind = behind.__cause__ or behind.__context__
    return behind


def no_space(path: Path) -> UserError:
    """The error of a full disk, to be raised for `path`."""
    return UserError(
        f"no space left for {path}: free some, then run the same command again (nothing that was there is lost)"
    )


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a file atomically; text as UTF-8."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, value: object) -> None:
    """Write a value as JSON, atomically."""
    write_atomic(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises UserError when the file is damaged."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is damaged: expected JSON ({error}); remove it and run the stage again") from error


def expect_files(directory: Path, stage: str, *names: str) -> None:
    """Raises UserError when a folder does not have what `stage` writes there."""
    for name in names:
        if not (directory / name).is_file():
            raise UserError(f"no {stage} in {directory}: expected {name}, found none; run the stage {stage} first")


def fsync_file(path: Path) -> None:
    """Wait until the content of a file is on the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def fsync_directory(path: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fill(file: FileIO, memory: memoryview) -> int:
    """Read up to the end of the memory or of the file, since one read may give less; how many bytes."""
    done = 0
    while done < len(memory) and (count := file.readinto(memory[done:])):
        done += count
    return done


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
