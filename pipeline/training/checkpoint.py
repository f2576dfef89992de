"""Checkpoints: atomic; incomplete ones are ignored.

    checkpoints/step-00001000.tmp/   each rank writes its files into a folder of its own there, hashes and fsyncs them
                                     while it writes, and moves them up
      -> rank 0 hears (name, size, SHA-256) of all, compares that with the files on disk, and writes manifest.json
      -> rename to step-00001000 -> fsync of the folder

| file                          | written, hashed and fsynced by    | holds                                     |
|-------------------------------|-----------------------------------|-------------------------------------------|
| `trainer.json`                | rank 0, `trainer.py`              | step, non-finite steps, means, `Best`     |
| `model.json`                  | rank 0, `trainer.py`              | what an export needs: `Exported`          |
| `ema-<rank>.safetensors`      | each rank, `trainer.py`           | with `ema_decay`: shards of the average   |
| `training.pt`                 | rank 0, `engines/accelerate.py`   | weights, buffers, optimizer, fp16 scaler  |
| `training-<rank>.safetensors` | each rank, `engines/deepspeed.py` | shards of weights and optimizer states    |
| `buffers-00000.safetensors`   | rank 0, `engines/deepspeed.py`    | persistent buffers                        |
| `engine.json`                 | rank 0, `engines/deepspeed.py`    | shapes, optimizer's name, fp16 loss scale |
| `manifest.json`               | rank 0, this module, last         | step, that of the best one with           |
|                               |                                   | `keep_best`; size and SHA-256 of the      |
|                               |                                   | rest, of large files one for each block   |

In the background, a thread of each rank writes what was copied to the host's memory, while the training goes on. The
ranks speak with each other only where they all are at the same step: `save`, `poll` and `finish`. One save is under way
at most.

Shards: `sharded_state.py`. Random numbers and the order of samples need no file: both are functions of the step.

A process killed anywhere in a save leaves either the old checkpoints or the old ones and the new one. One of the same
step is `step-00001000.replaced` until the new one is complete, and gets its name back at the next start where that
never came to be.

On restore rank 0 picks the newest complete checkpoint for all ranks, who share the work of hashing it. A damaged one is
skipped with a warning, and moved aside to `step-00001000.damaged` once an older one is loaded; one that the system
refuses to read, which may pass, is skipped and stays. If there are checkpoints but none is usable, that is an error,
never a silent restart. What is to be deleted is renamed to `….trash` first; what
a process left of that, or of a save, is deleted at the next start.

With `keep_best` each of the newest checkpoints names the best one until then, and what one of them names stays:
whichever of them a training resumes from, the best one of that moment is there.
"""

from __future__ import annotations

import logging
import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from pipeline.core import distributed
from pipeline.core.atomic_io import fsync_directory, is_full, no_space, os_error, read_json, write_json
from pipeline.core.checkpoint_names import REPLACED, complete_checkpoints
from pipeline.core.errors import UserError
from pipeline.core.manifest import FileRecord, first_fault
from pipeline.training.checkpoint_files import Files, HostCopy, shares, write_files

log = logging.getLogger(__name__)

_LISTING_TIMEOUT_S = 90.0  # a client of a network file system may show a listing of up to a minute ago
_LOOKS_APART_S = 10.0  # while all wait for a save: the ranks meet more often than a collective times out
_READS = 3  # of a file that the system refuses
_READ_AGAIN_S = 2.0
Records = dict[str, FileRecord]
T = TypeVar("T")


@dataclass(frozen=True)
class Damage:
    """Why a checkpoint is not usable."""

    what: str
    may_pass: bool = False  # the system refuses to read it: no reason to move it aside

    def __str__(self) -> str:
        return self.what


@dataclass
class _Save:
    """A save under way."""

    step: int
    temporary: Path
    final: Path
    best: int | None  # step of the best checkpoint until then
    job: Future[Records | UserError | None]  # of this rank: its files; then, of rank 0, the rest
    written: list[Records] | None = None  # of all ranks; None: not all are done


class Checkpoints:
    """The checkpoints of one stage. Every method is collective: all ranks call it."""

    def __init__(self, directory: Path, keep: int, keep_every: int | None = None, in_background: bool = False) -> None:
        """`keep`: how many of the newest stay; `keep_every`: and the first one of each that many steps, for good."""
        self.directory = directory
        self.keep = keep
        self.keep_every = keep_every
        self._thread = ThreadPoolExecutor(1, "checkpoint") if in_background else None
        self._host = HostCopy()
        self._under_way: _Save | None = None
        self._damaged: set[Path] = set()  # those that are still there

    def path(self, step: int) -> Path:
        """The folder of the checkpoint after `step` steps."""
        return self.directory / f"step-{step:08d}"

    def save(self, step: int, files: Files, best: int | None = None) -> None:
        """Save the training after `step` steps; in the background, once `files` are copied to the host's memory.

        Args:
            files: this rank's. No two ranks write files of the same name.
            best: the step of a checkpoint, this one or one before, that stays as long as this one is to be kept.

        Raises:
            UserError: a rank could not write its files, or rank 0 does not see those of all; on every rank. In the
                background it is raised by a later call of `save`, `poll` or `finish`.
        """
        self.finish()
        final = self.path(step)
        temporary = final.with_suffix(".tmp")
        if distributed.is_main():
            if temporary.exists():
                _delete(temporary)
            temporary.mkdir(parents=True)
        distributed.barrier()
        copied = self._host.of(files) if self._thread else files
        job = self._start(partial(_write_own, temporary, copied, final))
        self._under_way = _Save(step, temporary, final, best, job)
        if not self._thread:
            self.finish()

    def poll(self) -> None:
        """Carry on the save that is under way, if there is one, without waiting for it. Raises as `save`."""
        if save := self._under_way:
            self._carry_on(save)

    def finish(self) -> None:
        """Wait until the save that is under way, if there is one, is complete. Raises as `save`."""
        while save := self._under_way:
            wait([save.job], _LOOKS_APART_S)
            self._carry_on(save)

    def _start(self, job: Callable[[], Records | UserError | None]) -> Future[Records | UserError | None]:
        if self._thread:
            return self._thread.submit(job)
        done: Future[Records | UserError | None] = Future()
        done.set_result(job())
        return done

    def _carry_on(self, save: _Save) -> None:
        """What all ranks' files are written of, rank 0 completes; when that is done, nothing is under way."""
        is_done = save.job.done()
        if save.written is None:
            outcomes = distributed.all_gather_objects(save.job.result() if is_done else None)
            self._raise_if_wrong(outcomes)
            written = [outcome for outcome in outcomes if isinstance(outcome, dict)]
            if len(written) == len(outcomes):
                save.written = written
                if distributed.is_main():
                    save.job = self._start(partial(self._complete, save, written))
            return
        done, outcome = distributed.broadcast_object((is_done, save.job.result() if is_done else None))
        self._raise_if_wrong([outcome])
        if done:
            self._under_way = None

    def _raise_if_wrong(self, outcomes: Sequence[Records | UserError | None]) -> None:
        for outcome in outcomes:
            if isinstance(outcome, UserError):
                self._under_way = None
                raise outcome

    def _complete(self, save: _Save, written: Sequence[Records]) -> UserError | None:
        """On rank 0: record what all ranks wrote, give it its name, and forget the oldest ones; or what is wrong."""
        temporary, final = save.temporary, save.final
        best = {} if save.best is None else {"best": save.best}
        try:
            _expect_on_disk(temporary, sorted(name for of_rank in written for name in of_rank))
            files = {name: of_rank[name] for of_rank in written for name in sorted(of_rank)}
            write_json(temporary / "manifest.json", {"step": save.step, **best, "files": files})
            replaced = _set_aside(final)
            temporary.rename(final)
            self._damaged.discard(final)
            fsync_directory(self.directory)
        except UserError as error:
            return error
        except OSError as error:
            return _not_written(final, error)
        if replaced:
            _delete(replaced)
        self._forget_old(save.step, save.best)
        return None

    def _forget_old(self, step: int, best: int | None) -> None:
        """What is of a later step, or damaged, is nothing to resume from: it neither counts nor goes."""
        usable = [path for path in self._found() if step_of(path) <= step and path not in self._damaged]
        first = {step_of(path) // self.keep_every: path for path in usable} if self.keep_every else {}
        milestones = {path for number, path in first.items() if number > 0}
        bests = {best, *(_best_of(path) for path in usable[: self.keep])}
        for old in usable[self.keep :]:
            if old not in milestones and step_of(old) not in bests:
                _delete(old)

    def restore(self, read: Callable[[Path], None]) -> int | None:
        """Load the newest usable checkpoint with `read(directory)` on every rank; its step, or None if there is none.

        Raises:
            UserError: there are checkpoints, but none is usable.
        """
        if distributed.is_main():
            _put_back(self.directory)
            for leftover in sorted([*self.directory.glob("step-*.trash"), *self.directory.glob("step-*.tmp")]):
                _delete(leftover)
        found = distributed.broadcast_object(self._found() if distributed.is_main() else [])
        problems: dict[Path, Damage] = {}
        for path in found:
            damage = self.damage(step_of(path))
            if not damage:
                read(path)
                if distributed.is_main() and problems:
                    self._damaged = _move_aside([of for of, damage in problems.items() if not damage.may_pass])
                    self._damaged |= {of for of, damage in problems.items() if damage.may_pass}
                return step_of(path)
            problems[path] = damage
            if distributed.is_main():
                log.warning("checkpoint %s is not usable (%s): trying the one before", path, damage)
        if problems:
            listed = "; ".join(f"{path.name}: {problem}" for path, problem in problems.items())
            first = "see to the file system and try again, " if any(of.may_pass for of in problems.values()) else ""
            raise UserError(
                f"expected a usable checkpoint in {self.directory}, found {len(problems)} damaged ones"
                f" ({listed}): {first}restore one from a backup, or remove the folder to start over"
            )
        return None

    def damage(self, step: int) -> Damage | None:
        """What is wrong with the checkpoint after `step` steps, or None. Each rank looks at its share of the files."""
        path = self.path(step)
        dealt = distributed.broadcast_object(_read(lambda: _dealt(path)) if distributed.is_main() else [])
        if isinstance(dealt, Damage):
            return dealt
        own = _read(lambda: _fault(path, dealt[distributed.rank()]))
        found = [damage for damage in distributed.all_gather_objects(own) if damage]
        return min(found, key=lambda damage: damage.may_pass, default=None)

    def _found(self) -> list[Path]:
        """The folders of complete checkpoints, newest first; what a dead process was writing is none."""
        return list(complete_checkpoints(self.directory).values())


def step_of(path: Path) -> int:
    """The step of a complete checkpoint's folder."""
    return int(path.name.removeprefix("step-"))


def _best_of(path: Path) -> int | None:
    """The step of the best checkpoint until a complete one, as that says."""
    try:
        best: int | None = read_json(path / "manifest.json").get("best")
    except (UserError, OSError):  # a damaged one names none
        return None
    return best


def _write_own(temporary: Path, files: Files, final: Path) -> Records | UserError:
    """Write this rank's files and make them durable; their records, or why that failed."""
    # A folder of its own: the listing of one that other machines write to may be old on a network file system.
    own = temporary / f"rank-{distributed.rank():05d}"
    try:
        own.mkdir()
        records = write_files(own, files)
        for name in records:
            (own / name).rename(temporary / name)
        own.rmdir()
        fsync_directory(temporary)
    except Exception as error:
        if is_full(temporary, error):
            return no_space(final)
        if (refusal := os_error(error)) is not None:
            return _not_written(final, refusal)
        raise
    return records


def _not_written(final: Path, error: OSError) -> UserError:
    return UserError(
        f"{final}: expected to write this checkpoint, found that the file system refuses ({error}): see to it, then run"
        " the same command again; the checkpoints of before are as they were"
    )


def _expect_on_disk(temporary: Path, written: list[str]) -> None:
    """Raises UserError when the folder does not have the files that all ranks wrote, and no others."""
    deadline = time.monotonic() + _LISTING_TIMEOUT_S
    while (found := sorted(path.name for path in temporary.iterdir())) != written:
        if time.monotonic() > deadline:
            different = sorted({*found} ^ {*written}) or ["two of the same name"]
            raise UserError(
                f"{temporary}: expected the {len(written)} files that {distributed.world_size()} processes wrote, found"
                f" {len(found)} (first difference: {different[0]}): see that all nodes mount the same file system there"
            )
        time.sleep(0.5)


def _read(look: Callable[[], T]) -> T | Damage:
    """What `look` finds in a checkpoint, or that the system refuses to read it, several times."""
    refused: OSError | None = None
    for attempt in range(_READS):
        time.sleep(_READ_AGAIN_S if attempt else 0)
        try:
            return look()
        except OSError as error:
            refused = error
    return Damage(f"cannot be read ({refused})", may_pass=True)


def _dealt(directory: Path) -> list[Records] | Damage:
    """The files of a checkpoint as its manifest has them, each process's share, or what is wrong with the manifest."""
    try:
        return shares(read_json(directory / "manifest.json")["files"], distributed.world_size())
    except FileNotFoundError:
        return Damage("manifest.json is missing")
    except (UserError, LookupError, TypeError, ValueError, AttributeError):
        return Damage("manifest.json is damaged")


def _fault(directory: Path, files: Records) -> Damage | None:
    fault = first_fault(directory, files)
    return Damage(f"{fault.path.name}: expected {fault.expected}, found {fault.found}") if fault else None


def _set_aside(final: Path) -> Path | None:
    """Rename the checkpoint that is to be replaced by one of the same step, if there is one; its name until then."""
    if not final.exists():
        return None
    replaced = final.with_suffix(REPLACED)
    if replaced.exists():
        _delete(replaced)
    return final.rename(replaced)


def _put_back(directory: Path) -> None:
    """What a process that was killed had set aside is the checkpoint of its step, unless the new one is complete."""
    for replaced in sorted(directory.glob(f"step-*{REPLACED}")):
        if (final := replaced.with_suffix("")).exists():
            _delete(replaced)
        else:
            replaced.rename(final)


def _move_aside(damaged: Sequence[Path]) -> set[Path]:
    """Rename checkpoints that are not usable, to be looked at; those that could not be renamed."""
    left = set()
    for path in damaged:
        aside = path.with_name(f"{path.name}.damaged")
        try:
            if aside.exists():
                _delete(aside)
            path.rename(aside)
        except OSError as error:
            left.add(path)
            log.warning("checkpoint %s could not be moved aside (%s): remove it", path, error)
    if names := ", ".join(f"{path.name}.damaged" for path in damaged if path not in left):
        log.warning("%s: moved aside %s; remove what nobody wants to look at", damaged[0].parent, names)
    return left


def _delete(path: Path) -> None:
    """Delete a folder. What cannot be deleted costs a warning, not the training: somebody may be reading it."""
    trash = path
    try:
        if path.suffix != ".trash":
            trash = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.trash")
            path.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)  # as much as can be
        if trash.exists():
            shutil.rmtree(trash)  # says what is in the way
    except OSError as error:
        log.warning("%s could not be deleted (%s): the next start of the stage tries again", trash, error)
