"""Sources -> image shards. Part after part, in worker processes; what is finished is never done again.

Each part of the source becomes at most one shard of each split, and a record that vouches for them (`prepare_part.py`).
A run that was killed finds these records and does only the other parts; then the index is written
(`prepare_index.py`). The result is a function of config and source alone, so it has the same bytes however often it was
interrupted and however many workers made it.

Whether an earlier part has the same key or image is known when all parts are made. So each leaves its hashes in
`parts/`, `duplicates.py` compares them, and the parts that hold duplicates are written again without them.

Parts are a function of the source, whoever makes them: array tasks take a share each (`prepare_share`), and `prepare`,
which follows, finds them finished.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np

from pipeline.config.prepare import PrepareConfig
from pipeline.core import signals
from pipeline.core.atomic_io import remove_leftovers
from pipeline.core.errors import StoppedOnRequest, UserError
from pipeline.core.progress import progress
from pipeline.core.urls import mask
from pipeline.data.duplicates import KEY, same_image, same_key
from pipeline.data.order import Ints
from pipeline.data.prepare_index import join_parts
from pipeline.data.prepare_part import PartTask, make_part, opened_source
from pipeline.data.shards import PrepareIndex
from pipeline.data.sources.base import Part, fault
from pipeline.data.worker_pool import in_processes

log = logging.getLogger(__name__)


def prepare(directory: Path, config: PrepareConfig, seed: int) -> PrepareIndex:
    """Make (or finish) the image shards in `directory`; returns the index, which is also in index.json.

    Raises:
        UserError: the source is not usable or went away, no sample is left, or too many were rejected.
        StoppedOnRequest: asked to stop; finished parts are kept.
    """
    directory.mkdir(parents=True, exist_ok=True)
    remove_leftovers(directory)
    tasks = _tasks(directory, config, seed)
    _make_parts(tasks, config.workers, "prepare")
    again = _tasks_with_duplicates(tasks)
    if again:
        _make_parts(again, config.workers, "prepare: without duplicates")
    return join_parts(directory, config, tasks)


def prepare_share(
    directory: Path,
    config: PrepareConfig,
    seed: int,
    share: Callable[[Sequence[PartTask]], Sequence[PartTask]],
    on_done: Callable[[int], None] = lambda count: None,
) -> None:
    """Make some parts of the source in `directory`, where others may be making the others; without index.

    `on_done`: hears after each part how many are done.

    Raises:
        UserError: the source is not usable or went away.
        StoppedOnRequest: asked to stop; finished parts are kept.
    """
    tasks = _tasks(directory, config, seed)
    mine = share(tasks)
    if not mine:
        found = "1 part, which another task makes" if len(tasks) == 1 else f"{len(tasks)} parts, fewer than tasks"
        log.info("prepare: the source has %s: nothing to do here", found)
        return
    _make_parts(mine, config.workers, "prepare", on_done)


def _tasks(directory: Path, config: PrepareConfig, seed: int) -> list[PartTask]:
    """The parts of all sources, source by source, as work to be done."""
    opened_source.cache_clear()  # one may have changed since an earlier call in this process
    return [
        PartTask(directory, alone, seed, part, source)
        for source, alone in enumerate(config.of_each_source())
        for part in _parts(alone, f"prepare.sources.{source}" if config.sources else "prepare.source")
    ]


def _parts(alone: PrepareConfig, key: str) -> list[Part]:
    """The parts of a source. Whatever its storage raises when it is listed is told in one line, with its `key`."""
    (source,) = alone.all_sources
    try:
        return list(opened_source(source, alone.image_size).parts(alone.shard_size))
    except (UserError, StoppedOnRequest):
        raise
    except Exception as error:  # each kind of storage has its own
        log.debug("the source cannot be listed", exc_info=True)
        raise UserError(
            f"{key} ({source.kind}) cannot be listed: {mask(fault(error))}: see that it is there, and that it may be "
            "read"
        ) from error


def _make_parts(
    tasks: Sequence[PartTask],
    workers: int | None,
    description: str,
    on_done: Callable[[int], None] = lambda count: None,
) -> None:
    """Make the parts that are not finished yet. Workers also check those that are: hashing takes its time."""
    workers = min(workers or len(os.sched_getaffinity(0)), len(tasks))
    made = (make_part(task) for task in tasks) if workers <= 1 else in_processes(make_part, tasks, workers)
    try:
        with closing(made), progress(total=len(tasks), description=description, unit="shard") as bar:
            for done, samples in enumerate(made, start=1):
                on_done(done)
                bar.set_postfix_str(f"{samples} samples in the last")
                bar.update(1)
                signals.check()
    except BrokenProcessPool as error:
        signals.check()
        raise UserError(
            "prepare: a worker process died (killed, or out of memory); finished shards are kept: run the same "
            "command again, with fewer prepare.workers if memory is short"
        ) from error


def _tasks_with_duplicates(tasks: Sequence[PartTask]) -> list[PartTask]:
    """Tasks that must be done again because samples of theirs repeat earlier ones, or because they no longer do.

    Images are compared with those of sources that ask for the same `near_duplicate_bits`.
    """
    counts, left_out_now = [], []
    for task in tasks:
        record = task.record()
        counts.append(record["hashes"]["samples"])
        left_out_now.append(len(record["without"]))
    files = [task.hashes_path for task in tasks]
    repeated = same_key(files, counts)
    reasons = dict.fromkeys(repeated.tolist(), "duplicate key")
    starts = np.cumsum([0, *counts])
    bits = [task.config.filters.near_duplicate_bits for task in tasks]
    for near_bits in sorted({asked for asked in bits if asked is not None}):
        near = _near_images(files, starts, [asked == near_bits for asked in bits], near_bits, repeated)
        reasons |= dict.fromkeys(near.tolist(), "near-duplicate")
    numbers = np.array(sorted(reasons), dtype=np.int64)
    bounds = np.searchsorted(numbers, starts).tolist()
    again = []
    for index, task in enumerate(tasks):
        mine = numbers[bounds[index] : bounds[index + 1]]
        if len(mine) or left_out_now[index]:
            keys = np.load(task.hashes_path)[mine - starts[index], KEY].tolist()
            without = {f"{key:016x}": reasons[number] for key, number in zip(keys, mine.tolist(), strict=True)}
            again.append(replace(task, without=without))
    return again


def _near_images(files: Sequence[Path], starts: Ints, of: Sequence[bool], near_bits: int, repeated: Ints) -> Ints:
    """The numbers of samples that look like an earlier one, among the parts that `of` chooses.

    `starts`: number of the first sample of each part, and behind the last one. `repeated`: those that are out already.
    """
    chosen = np.flatnonzero(of)
    own_starts = np.cumsum([0, *np.diff(starts)[chosen]])
    parts = np.searchsorted(starts, repeated, side="right") - 1
    mine = np.isin(parts, chosen)
    places = np.searchsorted(chosen, parts[mine])
    out = own_starts[places] + repeated[mine] - starts[parts[mine]]
    found = same_image([files[part] for part in chosen.tolist()], near_bits, out)
    within = np.searchsorted(own_starts, found, side="right") - 1
    return found - own_starts[within] + starts[chosen[within]]
