"""Checkpoints that are complete or do not count.

    checkpoints/step-00001000.tmp/   every rank writes its files and fsyncs them
      -> barrier -> manifest.json (size and SHA-256 of every file) -> fsync -> rename to step-00001000 -> fsync

A process killed anywhere in this leaves either the old checkpoints or the old ones and the new one. On
restore rank 0 picks the newest complete checkpoint for all ranks; a damaged one is skipped with a
warning, and if there are checkpoints but none is usable, that is an error, never a silent restart.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

from pipeline.core import distributed
from pipeline.core.atomic_io import fsync_directory, fsync_file, is_full, no_space, read_json, sha256_file, write_json
from pipeline.core.errors import UserError

log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one stage. Every method is collective: all ranks call it."""

    def __init__(self, directory: Path, keep: int) -> None:
        self.directory = directory
        self.keep = keep

    def save(self, step: int, write: Callable[[Path], None]) -> Path:
        """`write(directory)` is called on every rank and puts this rank's files there."""
        final = self.directory / f"step-{step:08d}"
        temporary = final.with_suffix(".tmp")
        if distributed.is_main():
            for old in (temporary, final):
                shutil.rmtree(old, ignore_errors=True)
            temporary.mkdir(parents=True)
        distributed.barrier()
        try:
            write(temporary)
        except Exception as error:
            if is_full(temporary, error):
                raise no_space(final) from error
            raise
        distributed.barrier()
        files = _files(temporary)
        mine = {}
        for path in files[distributed.rank() :: distributed.world_size()]:
            fsync_file(path)
            entry = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
            mine[str(path.relative_to(temporary))] = entry
        gathered = distributed.all_gather_objects(mine)
        if distributed.is_main():
            for folder in {path.parent for path in files} | {temporary}:
                fsync_directory(folder)
            listed = {name: entry for part in gathered for name, entry in part.items()}
            write_json(temporary / "manifest.json", {"step": step, "files": listed})
            temporary.rename(final)
            fsync_directory(self.directory)
            self._forget_old()
        distributed.barrier()
        return final

    def restore(self, read: Callable[[Path], None]) -> int | None:
        """Load the newest usable checkpoint with `read(directory)` on every rank; its step, or None if there is none.

        Raises:
            UserError: there are checkpoints, but none is usable.
        """
        found = distributed.broadcast_object(self._complete() if distributed.is_main() else None)
        problems: list[str] = []
        for path in found:
            problem = _damage(path)
            everywhere = [p for p in distributed.all_gather_objects(problem) if p]
            if not everywhere:
                read(path)
                return int(path.name.removeprefix("step-"))
            problems.append(f"{path.name}: {everywhere[0]}")
            if distributed.is_main():
                log.warning("checkpoint %s is not usable (%s): trying the one before", path, everywhere[0])
        if problems:
            raise UserError(
                f"expected a usable checkpoint in {self.directory}, found {len(problems)} damaged ones"
                f" ({'; '.join(problems)}): restore one from a backup, or remove the folder to start over"
            )
        return None

    def _complete(self) -> list[Path]:
        """Newest first. What was being written when a process died has no place among them."""
        return sorted((p for p in self.directory.glob("step-*") if p.suffix != ".tmp"), reverse=True)

    def _forget_old(self) -> None:
        for old in self._complete()[self.keep :]:
            shutil.rmtree(old)


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def _damage(directory: Path) -> str | None:
    """What is wrong with a checkpoint, or None. Each rank hashes its share of the files."""
    manifest = directory / "manifest.json"
    if not manifest.exists():
        return "manifest.json is missing"
    try:
        listed = read_json(manifest)["files"]
    except (UserError, KeyError):
        return "manifest.json is damaged"
    for index, (name, expected) in enumerate(sorted(listed.items())):
        path = directory / name
        size = path.stat().st_size if path.is_file() else None
        if size != expected["bytes"]:
            return f"{name}: expected {expected['bytes']} bytes, found {size or 'none'}"
        mine = index % distributed.world_size() == distributed.rank()
        if mine and sha256_file(path) != expected["sha256"]:
            return f"{name}: its SHA-256 is not the recorded one"
    return None
