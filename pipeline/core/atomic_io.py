"""Files that are either whole or not there: temporary name, fsync, rename, fsync of the folder."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.core.errors import UserError


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; renames it to `path` when the block ends without error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Process ids repeat from host to host, and two may write the same file.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        fsync_file(temporary)
        temporary.replace(path)
        fsync_directory(path.parent)
    except BaseException as error:
        full = is_full(path.parent, error)  # before the half-written file makes room again
        temporary.unlink(missing_ok=True)
        if full:
            raise no_space(path) from error
        raise


def remove_leftovers(directory: Path) -> None:
    """Remove the temporary files of `atomic_path` that killed processes left anywhere under `directory`.

    Call it only where no other process writes.
    """
    for leftover in directory.rglob(".*.tmp"):
        leftover.unlink()


def is_full(directory: Path, error: BaseException) -> bool:
    """Is `error` that of a full disk? Libraries that write through C++ hide the reason, so the disk is asked too."""
    full = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, OSError) and error.errno in full:
        return True
    if any(f"(os error {number})" in str(error) for number in full):  # as Rust says it, safetensors for one
        return True
    return isinstance(error, (OSError, RuntimeError)) and shutil.disk_usage(directory).free < 1 << 20


def no_space(path: Path) -> UserError:
    return UserError(
        f"no space left for {path}: free some, then run the same command again (nothing that was there is lost)"
    )


def write_atomic(path: Path, content: bytes | str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Raises UserError when the file is not whole JSON."""
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
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def fsync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
