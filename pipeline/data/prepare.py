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
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.config.prepare import PrepareConfig
from pipeline.core import signals
from pipeline.core.atomic_io import remove_leftovers
from pipeline.core.errors import StoppedOnRequest, UserError
from pipeline.core.progress import progress
from pipeline.core.urls import mask
from pipeline.data.duplicates import KEY, Marks, same_image, same_key
from pipeline.data.prepare_index import join_parts
from pipeline.data.prepare_part import PartTask, make_part, opened_source
from pipeline.data.shards import PrepareIndex
from pipeline.data.sources.base import Part, fault
from pipeline.data.worker_pool import in_processes

log = logging.getLogger(__name__)

_REASONS = ("", "duplicate key", "near-duplicate")  # to leave out a sample that another part tells


def prepare(directory: Path, config: PrepareConfig, seed: int) -> PrepareIndex:
    """Make (or finish) the image shards in `directory`; returns the index, which is also in index.json.

    Raises:
        UserError: the source is not usable or went away, no sample is left, or too many were rejected.
        StoppedOnRequest: asked to stop; finished parts are kept.
    """
    directory.mkdir(parents=True, exist_ok=True)
    remove_leftovers(directory)
    tasks = _tasks(directory, config, seed)
    _make_parts(tasks, len(tasks), config.workers, "prepare")
    reasons = _duplicates(tasks)
    again = _with_duplicates(tasks, reasons)
    if again:
        of_part = _without_duplicates(again, reasons)
        _make_parts(of_part, len(again), config.workers, "prepare: without duplicates")
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
    _make_parts(mine, len(mine), config.workers, "prepare", on_done)


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
    tasks: Iterable[PartTask],
    count: int,
    workers: int | None,
    description: str,
    on_done: Callable[[int], None] = lambda count: None,
) -> None:
    """Make the parts that are not finished yet. Workers also check those that are: hashing takes its time."""
    workers = min(workers or len(os.sched_getaffinity(0)), count)
    made = (make_part(task) for task in tasks) if workers <= 1 else in_processes(make_part, tasks, workers)
    try:
        with closing(made), progress(total=count, description=description, unit="shard") as bar:
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


def _duplicates(tasks: Sequence[PartTask]) -> list[NDArray[np.uint8]]:
    """Of each part, why each of its samples is out: a number into `_REASONS`.

    Images are compared with those of sources that ask for the same `near_duplicate_bits`.
    """
    counts = [task.record()["hashes"]["samples"] for task in tasks]
    files = [task.hashes_path for task in tasks]
    reasons = same_key(files, counts).astype(np.uint8)
    of_parts = [reasons[begin:end] for begin, end in pairwise(np.cumsum([0, *counts]))]
    bits = [task.config.filters.near_duplicate_bits for task in tasks]
    for near_bits in sorted({asked for asked in bits if asked is not None}):
        chosen = [part for part, asked in enumerate(bits) if asked == near_bits]
        repeated: Marks = np.concatenate([of_parts[part] for part in chosen]).astype(bool)
        near = same_image([files[part] for part in chosen], near_bits, repeated)
        for part, (begin, end) in zip(
            chosen, pairwise(np.cumsum([0, *(counts[part] for part in chosen)])), strict=True
        ):
            of_parts[part][near[begin:end]] = _REASONS.index("near-duplicate")
    return of_parts


def _with_duplicates(tasks: Sequence[PartTask], reasons: Sequence[NDArray[np.uint8]]) -> list[tuple[int, PartTask]]:
    """Parts, by their number among all, of which samples are to be left out, or no longer."""
    return [
        (number, task)
        for number, (task, why) in enumerate(zip(tasks, reasons, strict=True))
        if why.any() or task.record()["without"]
    ]


def _without_duplicates(
    tasks: Iterable[tuple[int, PartTask]], reasons: Sequence[NDArray[np.uint8]]
) -> Iterator[PartTask]:
    """These parts as work that must be done again: only those that are being done have a list of their duplicates."""
    for number, task in tasks:
        out = np.flatnonzero(reasons[number])
        keys = np.load(task.hashes_path)[out, KEY].tolist()
        whys = [_REASONS[why] for why in reasons[number][out].tolist()]
        yield replace(task, without={f"{key:016x}": why for key, why in zip(keys, whys, strict=True)})
