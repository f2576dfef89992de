"""Whether a place can be written to, asked before the work whose result goes there; a new folder there, all at once."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.core.atomic_io import fsync_directory
from pipeline.core.errors import UserError


def check_writable(path: Path) -> None:
    """Make the folders above the file or folder `path`, and try a file as `atomic_path` makes one there.

    Raises:
        UserError: a folder cannot be made or written to, or the name is too long.
    """
    probe = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp") if path.name else path / f".{uuid.uuid4().hex}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        why = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path}: expected a place to write to, found: {why}; choose another") from error


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A draft, which gets its name when the block ends without error.

    Raises:
        UserError: `target` holds something, or cannot be written to.
    """
    target = Path(os.path.abspath(target))  # "." has no name to put a draft beside
    check_writable(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"expected a new or empty folder at {target}, found something there: choose another")
    draft = target.with_name(f".{target.name}.exporting")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    yield draft
    if target.exists():
        target.rmdir()
    draft.rename(target)
    fsync_directory(target.parent)
