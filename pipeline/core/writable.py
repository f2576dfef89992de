"""Whether a place can be written to, asked before the work whose result goes there."""

from __future__ import annotations

import uuid
from pathlib import Path

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
