"""Whether a place can be written to, asked before the work whose result goes there; a new folder there, all at once."""

from __future__ import annotations

import glob
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.core.atomic_io import fsync_directory
from pipeline.core.errors import UserError

_DRAFT = ".exporting"
_ABANDONED_S = 24 * 3600


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


class Taken(UserError):
    """A new folder's place holds something already."""


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A draft, which gets its name when the block ends without error, and is removed when it does not.

    Raises:
        Taken: `target` holds something: before, or another process was faster.
        UserError: it cannot be written to.
    """
    target = Path(os.path.abspath(target))  # "." has no name to put a draft beside
    check_writable(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise _taken(target)
    draft = target.with_name(f".{target.name}.{uuid.uuid4().hex}{_DRAFT}")  # two processes may make the same folder
    draft.mkdir()
    try:
        _remove_abandoned(draft, target)
        yield draft
        try:
            draft.rename(target)  # takes the place of an empty folder, and of no other
        except OSError as error:
            if target.exists():
                raise _taken(target) from error
            raise
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    fsync_directory(target.parent)


def _taken(target: Path) -> Taken:
    return Taken(f"expected a new or empty folder at {target}, found something there: choose another")


def _remove_abandoned(draft: Path, target: Path) -> None:
    """Remove the drafts of `target` that killed processes left: nothing was begun in them for a day."""
    now = draft.stat().st_mtime  # by the clock of the file system, which may be another machine's
    for other in target.parent.glob(f".{glob.escape(target.name)}.*{_DRAFT}"):
        with suppress(OSError):  # another process removes it, too
            if now - other.stat().st_mtime > _ABANDONED_S:
                shutil.rmtree(other)
