"""What of the runs in a folder may be deleted, and how much room that makes. Imports no torch."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from errno import EBUSY
from pathlib import Path

from pipeline.config.pipeline import PipelineConfig, load_pipeline
from pipeline.core import elsewhere
from pipeline.core.errors import UserError
from pipeline.core.lock import owner_of
from pipeline.orchestration.graph import STAGE_NAMES, Stage, stages_of
from pipeline.orchestration.run_directory import RunDirectory, config_of

# Copies that versions before sent to MLflow: arrays of tokens and indexes, which lie in the run as well.
_COPIED = ("*.npy", "*.keys.txt", "*.captions.txt")
_LEFT = ("*.trash", "*.damaged", "*.damaged-*")  # of checkpoints
_CACHE = ".cache"  # of all runs
_ASKED_AT_MOST = 2_000  # files of a folder, for their size
_TRASH = ".trash-"  # what a `--prune` that was killed had begun to delete


@dataclass(frozen=True)
class Deletable:
    """Files or folders that no command needs any more, and why; `path` is, or holds, all of `paths`."""

    path: Path
    paths: tuple[Path, ...]
    bytes: int
    why: str


def runs_in(folder: Path) -> list[Path]:
    """The run directories in `folder`, by name, and folders that may be some, for this user may not look into them.

    Raises:
        UserError: there is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"expected a folder of runs, found none at {folder}: give it with --in FOLDER")
    return sorted(path for path in folder.iterdir() if _may_be_a_run(path))


def _may_be_a_run(path: Path) -> bool:
    try:
        return (path / "config.yaml").is_file() and (path / "run.json").is_file()
    except PermissionError:
        return not path.name.startswith(".")


def is_at_work(run: Path) -> bool:
    """Whether a process holds one of the run's locks.

    Raises:
        OSError: they cannot be read.
    """
    try:
        locks = os.listdir(run / "locks")  # Path.glob takes a folder that is closed for an empty one
    except FileNotFoundError:
        return False
    return any(owner_of(run / "locks" / name) for name in locks if name.endswith(".json"))


def size_of(paths: Iterable[Path]) -> int:
    """Bytes of files and folders; what several names share counts once."""
    seen: set[tuple[int, int]] = set()
    total = 0
    for path in paths:
        for about in _entries(path):
            total += 0 if _is_known(about, seen) else about.st_size
    return total


def _is_known(about: os.stat_result, seen: set[tuple[int, int]]) -> bool:
    """Whether a file has been counted by another name; from now on it has."""
    key = about.st_dev, about.st_ino
    known = key in seen
    seen.add(key)
    return known


def size_of_run(run: RunDirectory) -> tuple[int, bool]:
    """Bytes of a run's files, and whether that is an estimate.

    The file system is not asked for what a finished stage has recorded. Of a folder's other files, of which a stage at
    work may have made a hundred thousand, it is asked for some thousands, and the rest are taken to be like them.
    """
    recorded = _recorded_sizes(run)
    seen: set[tuple[int, int]] = set()
    total, estimated, folders = 0, False, [str(run.path)]
    while folders:
        try:
            with os.scandir(folders.pop()) as found:
                entries = list(found)
        except OSError:
            continue
        total += sum(recorded.get(entry.path, 0) for entry in entries)
        entries = [entry for entry in entries if entry.path not in recorded]
        folders += [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
        others = [entry.path for entry in entries if not entry.is_dir(follow_symlinks=False)]
        asked = others[:: len(others) // _ASKED_AT_MOST + 1]
        sizes = [0 if _is_known(about, seen) else about.st_size for path in asked for about in _entries(Path(path))]
        estimated |= len(asked) < len(others)
        total += sum(sizes) * len(others) // max(len(asked), 1)
    return total, estimated


def _recorded_sizes(run: RunDirectory) -> dict[str, int]:
    """Bytes of each output, a file or a folder, of each finished stage, by path."""
    sizes = {}
    for stage in STAGE_NAMES:
        stored = elsewhere.read(run.stage(stage))
        for name, about in (manifest["outputs"] if (manifest := run.manifest(stage)) else {}).items():
            if "bytes" in about and not (stored and name in stored.folders):
                sizes[f"{run.path}/{stage}/{name}"] = about["bytes"]
    return sizes


def deletable(folder: Path) -> tuple[list[Deletable], dict[str, str]]:
    """What may go, of all runs in `folder` that nobody works on; and which runs are left alone, by name, and why.

    What they share may go only where nobody works at all.
    """
    found: list[Deletable] = []
    left_alone: dict[str, str] = {}
    for run in runs_in(folder):
        try:
            if is_at_work(run):
                left_alone[run.name] = "a process is at work there"
            else:
                found += list(_of_run(run))
        except OSError as error:
            left_alone[run.name] = f"it cannot be read ({error.strerror})"
    cache = folder / _CACHE / "features"
    if not left_alone:
        if cache.is_dir():
            found.append(_entry(cache, "features of images, which evaluate computes again"))
        found += _begun_to_delete(cache.parent)
    return found, left_alone


def asked_for(folder: Path) -> list[Path]:
    """Exports of single checkpoints in the runs: somebody wanted them, and what made them may be gone, so they stay."""
    return [path for run in runs_in(folder) for path in sorted(run.glob("*/exported/*")) if path.is_dir()]


def delete(found: Deletable, folder: Path) -> None:
    """Remove it, by a new name first, so that a half of it never passes for the whole.

    Raises:
        OSError: it cannot be removed, or somebody has begun to work in that run of `folder` since it was found.
    """
    of_one_run = found.path.relative_to(folder).parts[0] != _CACHE
    users = [folder / found.path.relative_to(folder).parts[0]] if of_one_run else runs_in(folder)
    if busy := [run.name for run in users if is_at_work(run)]:
        raise BlockingIOError(EBUSY, f"a process is at work in {busy[0]} now")
    for path in found.paths:
        trash = path if path.name.startswith(_TRASH) else path.with_name(f"{_TRASH}{path.name}")
        path.rename(trash)
        if trash.is_dir() and not trash.is_symlink():
            shutil.rmtree(trash)
        else:
            trash.unlink()


def _of_run(run: Path) -> Iterator[Deletable]:
    for old in sorted((run / "superseded").glob("[!.]*")):
        yield _entry(old, "made by another config; made again if that one returns")
    try:
        config = load_pipeline(config_of(run))
    except UserError:  # of a later version, or damaged: only what is told by its place
        config = None
    runs = RunDirectory(run)
    final = {stage.name for stage in stages_of(config) if _is_final(runs, config, stage)} if config else set()
    for folder in sorted(path for path in run.iterdir() if path.is_dir()):
        yield from _begun_to_delete(folder)
        checkpoints = folder / "checkpoints"
        if folder.name in final and checkpoints.is_dir():
            yield _entry(checkpoints, "checkpoints of a finished training; its weights are in model/")
        else:
            yield from _begun_to_delete(checkpoints)
            for path in sorted(path for pattern in _LEFT for path in checkpoints.glob(pattern)):
                yield _entry(path, "a damaged or discarded checkpoint")
    artifacts = run / "mlartifacts"
    if copied := tuple(path for pattern in _COPIED for path in artifacts.rglob(pattern)):
        why = "copies of the run's arrays that a version before sent to MLflow"
        yield Deletable(artifacts, copied, size_of(copied), why)


def _begun_to_delete(folder: Path) -> Iterator[Deletable]:
    for path in sorted(folder.glob(f"{_TRASH}*")):
        yield _entry(path, "what an interrupted --prune has left")


def _is_final(runs: RunDirectory, config: PipelineConfig, stage: Stage) -> bool:
    """Whether the stage is finished for the run's config; with another one, of more steps, it resumes."""
    return stage.trains and not runs.stale_reasons(config, stage)


def _entry(path: Path, why: str) -> Deletable:
    return Deletable(path, (path,), size_of([path]), why)


def _entries(path: Path) -> Iterator[os.stat_result]:
    """Of the file `path`, or of all files below it; what disappears meanwhile is left out."""
    try:
        if not path.is_dir() or path.is_symlink():
            yield path.lstat()
            return
        with os.scandir(path) as entries:
            found = list(entries)
    except OSError:
        return
    for entry in found:
        yield from _entries(Path(entry.path))
