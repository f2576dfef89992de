"""Checkpoints: atomic; incomplete ones are ignored.

    checkpoints/step-00001000.tmp/   every rank writes its files -> barrier -> each rank fsyncs and hashes its share of
                                     all files, whoever wrote them -> rank 0 writes manifest.json and fsyncs
      -> rename to step-00001000 -> fsync of the folder

| file                          | written by                        | holds                                     |
|-------------------------------|-----------------------------------|-------------------------------------------|
| `trainer.json`                | rank 0, `trainer.py`              | step, non-finite steps, running means     |
| `ema-<rank>.safetensors`      | each rank, `trainer.py`           | with `ema_decay`: shards of the average   |
| `training.pt`                 | rank 0, `engines/accelerate.py`   | weights, buffers, optimizer, fp16 scaler  |
| `training-<rank>.safetensors` | each rank, `engines/deepspeed.py` | shards of weights and optimizer states    |
| `buffers-00000.safetensors`   | rank 0, `engines/deepspeed.py`    | persistent buffers                        |
| `engine.json`                 | rank 0, `engines/deepspeed.py`    | shapes, optimizer's name, fp16 loss scale |
| `manifest.json`               | rank 0, this module, last         | step; size and SHA-256 of all the others  |

Shards: `sharded_state.py`. Random numbers and the order of samples need no file: both are functions of the step.

A process killed anywhere in a save leaves either the old checkpoints or the old ones and the new one. On restore rank 0
picks the newest complete checkpoint for all ranks; a damaged one is skipped with a warning, and if there are
checkpoints but none is usable, that is an error, never a silent restart.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

from pipeline.core import distributed
from pipeline.core.atomic_io import fsync_directory, fsync_file, is_full, no_space, read_json, write_json
from pipeline.core.errors import UserError
from pipeline.core.manifest import first_fault, record

log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one stage, of which the newest `keep` stay. Every method is collective: all ranks call it."""

    def __init__(self, directory: Path, keep: int) -> None:
        self.directory = directory
        self.keep = keep

    def save(self, step: int, write: Callable[[Path], None]) -> Path:
        """Save the training after `step` steps; returns the checkpoint's folder.

        Args:
            write: `write(directory)` is called on every rank, and writes this rank's files there.

        Raises:
            UserError: the disk is full.
        """
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
        self._commit(step, temporary, final)
        distributed.barrier()
        return final

    def _commit(self, step: int, temporary: Path, final: Path) -> None:
        """Make what all ranks wrote durable, record it, and give it its name."""
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        recorded = {}
        for path in files[distributed.rank() :: distributed.world_size()]:
            fsync_file(path)
            recorded[str(path.relative_to(temporary))] = record(path)
        gathered = distributed.all_gather_objects(recorded)
        if distributed.is_main():
            for folder in {path.parent for path in files} | {temporary}:
                fsync_directory(folder)
            listed = {name: entry for of_rank in gathered for name, entry in of_rank.items()}
            write_json(temporary / "manifest.json", {"step": step, "files": listed})
            temporary.rename(final)
            fsync_directory(self.directory)
            for old in self._complete()[self.keep :]:
                shutil.rmtree(old)

    def restore(self, read: Callable[[Path], None]) -> int | None:
        """Load the newest usable checkpoint with `read(directory)` on every rank; its step, or None if there is none.

        Raises:
            UserError: there are checkpoints, but none is usable.
        """
        found = distributed.broadcast_object(self._complete() if distributed.is_main() else [])
        problems: list[str] = []
        for path in found:
            everywhere = [damage for damage in distributed.all_gather_objects(_damage(path)) if damage]
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
        """The folders of complete checkpoints, newest first; what a dead process was writing is none."""
        return sorted((p for p in self.directory.glob("step-*") if p.suffix != ".tmp"), reverse=True)


def _damage(directory: Path) -> str | None:
    """The first fault of a checkpoint, or None. Each rank hashes its share of the files."""
    manifest = directory / "manifest.json"
    if not manifest.exists():
        return "manifest.json is missing"
    try:
        files = dict(sorted(read_json(manifest)["files"].items()))
    except (UserError, KeyError):
        return "manifest.json is damaged"
    fault = first_fault(directory, files, rank=distributed.rank(), ranks=distributed.world_size())
    return f"{fault.path.name}: expected {fault.expected}, found {fault.found}" if fault else None
