"""One of two processes that save checkpoints: what each of them made durable, for test_checkpoint.py."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from pipeline.core import distributed
from pipeline.core.errors import UserError
from pipeline.core.manifest import FileRecord
from pipeline.training import checkpoint
from pipeline.training.checkpoint import Checkpoints
from pipeline.training.checkpoint_files import Files, write_files


def files() -> Files:
    return {f"{kind}-{distributed.rank():05d}.json": [distributed.rank()] * 300 for kind in ("training", "ema")}


def write_to_a_full_disk(directory: Path, files: Files) -> dict[str, FileRecord]:
    if distributed.rank() == 1:
        raise OSError(errno.ENOSPC, "No space left on device")
    return write_files(directory, files)


def main(folder: Path) -> None:
    distributed.init()
    rank = distributed.rank()
    checkpoints = Checkpoints(folder / "checkpoints", keep=2, in_background=sys.argv[2] == "True")
    synced: list[str] = []
    fsync, iterdir, rglob = os.fsync, Path.iterdir, Path.rglob

    def recorded(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.is_file() and "manifest" not in path.name and path.suffix != ".tmp":
            synced.append(path.name)
        fsync(descriptor)

    def stale(path: Path, listing: Iterator[Path]) -> list[Path]:
        """What a client of a network file system shows that has not asked again: its own files alone."""
        shared = rank == 1 and path.suffix == ".tmp"
        return [one for one in listing if not shared or one.stem.endswith(f"{rank:05d}")]

    os.fsync = recorded
    Path.iterdir = lambda path: iter(stale(path, iterdir(path)))  # type: ignore[method-assign]
    Path.rglob = lambda path, pattern: iter(stale(path, rglob(path, pattern)))  # type: ignore[method-assign]
    checkpoints.save(1, files())
    checkpoints.finish()
    os.fsync, Path.iterdir, Path.rglob = fsync, iterdir, rglob  # type: ignore[method-assign]
    try:
        checkpoint.write_files = write_to_a_full_disk
        checkpoints.save(2, files())
        checkpoints.finish()
        full = ""
    except UserError as error:
        full = str(error)
    restored = checkpoints.restore(lambda _: None)
    (folder / f"rank-{rank}.json").write_text(json.dumps({"synced": synced, "restored": restored, "full": full}))
    distributed.leave(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
