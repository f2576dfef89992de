"""A source -> image shards. Part after part, in worker processes; what is finished is never done again.

Each part of the source becomes at most one shard of each split and one file in `parts/`, written last, that says what
became of every record. A run that was killed finds these files, checks that they belong to today's config and source
and that the shards are as recorded, and does only the other parts. The result is a function of config and source alone,
so it has the same bytes however often it was interrupted and however many workers made it.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline import stop
from pipeline.config import digest, identity
from pipeline.data.config import PrepareConfig
from pipeline.data.images import BadSample, decode, grid, random_of, square
from pipeline.data.order import ShardOrder, key_of
from pipeline.data.shards import SPLITS, Sample, Shard, read_png, write_shard
from pipeline.data.sources import Part, Record, Unreadable, open_source
from pipeline.errors import StoppedOnRequest, UserError
from pipeline.files import read_json, sha256_file, write_atomic, write_json
from pipeline.progress import progress

_SHEET_SIDE = 12  # pictures a side of the contact sheet


@dataclass(frozen=True)
class Task:
    """What a worker needs to make the shards of a part. `taken` are keys that earlier parts already use."""

    directory: Path
    config: PrepareConfig
    seed: int
    part: Part
    taken: frozenset[str] = frozenset()

    @property
    def record_path(self) -> Path:
        return self.directory / "parts" / f"{self.part.number:06d}.json"

    @property
    def fingerprint(self) -> str:
        return digest([self.part.fingerprint, identity(self.config), self.seed])


def prepare(directory: Path, config: PrepareConfig, seed: int) -> dict[str, Any]:
    """Make (or finish) the image shards in `directory`; returns the index, which is also in index.json.

    Raises:
        UserError: the source is not usable, no sample is left, or too many were rejected.
        StoppedOnRequest: asked to stop; finished parts are kept.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for leftover in directory.rglob(".*.tmp"):
        leftover.unlink()
    source = open_source(config.source, config.image_size)
    tasks = [Task(directory, config, seed, part) for part in source.parts(config.shard_size)]
    _run(tasks, config.workers)
    _run(_without_duplicates(tasks), config.workers)
    return _join(directory, config, tasks)


def split_of(key: str, validation_fraction: float) -> str:
    """The split of a sample: a stable hash of its key alone, so that it never moves when samples are added."""
    return "val" if key_of("split", key) < validation_fraction * 2**64 else "train"


def safe_key(key: str) -> str:
    """`key` as a member name of a tar that any WebDataset reader takes for one key: no folders, no dots."""
    printable = "".join(c if c.isprintable() and not 0xD800 <= ord(c) < 0xE000 else f"%{ord(c):02X}" for c in key)
    escaped = printable.replace("/", "%2F").replace(".", "%2E")
    # Readers skip members that begin with two underscores.
    return "%5F" + escaped[1:] if escaped.startswith("_") else escaped


# --- one part, in a worker ---------------------------------------------------------------------------------------


def make_part(task: Task) -> int:
    """Make the shards of one part and its record. Returns how many records the part held."""
    kept: dict[str, list[Sample]] = {split: [] for split in SPLITS}
    rejected: list[dict[str, str]] = []
    conversions: Counter[str] = Counter()
    keys: set[str] = set()
    source = open_source(task.config.source, task.config.image_size)
    for record in source.records(task.part):
        try:
            sample, changed = _sample(record, task)
            if sample.key in keys or sample.key in task.taken:
                raise BadSample("duplicate key", "an earlier sample has the same key")
        except BadSample as bad:
            rejected.append({"key": record.key, "reason": bad.reason, "detail": bad.detail})
            continue
        keys.add(sample.key)
        conversions.update(changed)
        kept[split_of(sample.key, task.config.validation_fraction)].append(sample)
    shards: dict[str, dict[str, Any]] = {}
    for split, samples in kept.items():
        name = f"{split}/{task.part.number:06d}.tar"
        if samples:
            count, size, sha256 = write_shard(task.directory / name, samples)
            shards[split] = {"name": name, "samples": count, "bytes": size, "sha256": sha256}
    record_of_part = {
        "fingerprint": task.fingerprint,
        "shards": shards,
        "keys": sorted(keys),
        "conversions": dict(sorted(conversions.items())),
        "rejected": rejected,
    }
    write_json(task.record_path, record_of_part)
    return len(keys) + len(rejected)


def _sample(record: Record | Unreadable, task: Task) -> tuple[Sample, tuple[str, ...]]:
    """Raises BadSample."""
    if isinstance(record, Unreadable):
        raise BadSample(record.reason, record.detail)
    config = task.config
    caption = _caption(record.caption, config)
    decoded = decode(record.image, record.extension, config.filters)
    where = (0.5, 0.5)
    if config.crop == "random":
        rng = random_of("crop", task.seed, record.key)
        where = (rng.random(), rng.random())
    picture = square(decoded.picture, config.image_size, where)
    png = io.BytesIO()
    picture.save(png, "PNG")
    try:
        json.dumps(record.meta)
    except (TypeError, ValueError) as error:
        raise BadSample("metadata is not JSON", str(error)) from error
    return Sample(safe_key(record.key), png.getvalue(), caption, record.meta), decoded.conversions


def _caption(raw: bytes | str | None, config: PrepareConfig) -> str:
    if raw is None:
        raise BadSample("missing caption")
    try:
        # Surrogates stand for bytes that were not UTF-8 in a table.
        text = raw.decode("utf-8-sig") if isinstance(raw, bytes) else raw.encode().decode()
    except UnicodeError as error:
        raise BadSample("caption is not UTF-8", str(error)) from error
    text = " ".join(text.split())
    if not text:
        raise BadSample("empty caption")
    shortest, longest = config.filters.min_caption_length, config.filters.max_caption_length
    if not shortest <= len(text) <= longest:
        raise BadSample("caption length", f"{len(text)} characters, expected {shortest} to {longest}")
    return text


# --- all parts, in the stage's process ---------------------------------------------------------------------------


def _run(tasks: list[Task], workers: int | None) -> None:
    """Make the parts that are not finished yet."""
    to_do = [task for task in tasks if not _is_finished(task)]
    if not to_do:
        return
    bar: Any = progress(total=len(tasks), initial=len(tasks) - len(to_do), description="prepare", unit="shard")
    workers = min(workers or len(os.sched_getaffinity(0)), len(to_do))
    with bar:
        for count in map(make_part, to_do) if workers == 1 else _in_processes(to_do, workers):
            bar.set_postfix_str(f"{count} samples in the last")
            bar.update(1)
            stop.check()


def _in_processes(tasks: list[Task], workers: int) -> Iterator[int]:
    """`make_part` of every task; yields in the order of completion. Only as many tasks as needed are in flight."""
    # forkserver: forking a process that runs threads (trackers, collectives) can deadlock its children.
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker) as pool:
        waiting = iter(tasks)
        running: set[Future[int]] = set()
        try:
            while True:
                while len(running) < 2 * workers and (task := next(waiting, None)) is not None:
                    running.add(pool.submit(make_part, task))
                if not running:
                    return
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        except BrokenProcessPool as error:
            stop.check()
            raise UserError(
                "prepare: a worker process died (killed, or out of memory); finished shards are kept: run the same "
                "command again, with fewer prepare.workers if memory is short"
            ) from error
        except (GeneratorExit, StoppedOnRequest):
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _start_worker() -> None:
    """The parent decides when to stop, between parts; a worker whose parent died must not linger."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:

        def follow() -> None:
            connection.wait([parent.sentinel])
            os._exit(1)

        threading.Thread(target=follow, daemon=True).start()


def _is_finished(task: Task) -> bool:
    """Whether the record of the part is there, of today's config and source, and its shards are as it says."""
    if not task.record_path.is_file():
        return False
    record = read_json(task.record_path)
    if record["fingerprint"] != task.fingerprint or not task.taken.isdisjoint(record["keys"]):
        return False
    for shard in record["shards"].values():
        path = task.directory / shard["name"]
        if not path.is_file() or path.stat().st_size != shard["bytes"] or sha256_file(path) != shard["sha256"]:
            return False
        if not path.with_suffix(".index.npy").is_file():
            return False
    return True


def _without_duplicates(tasks: list[Task]) -> list[Task]:
    """Tasks that must be repeated because earlier parts use some of their keys: the first one keeps a key."""
    seen: set[str] = set()
    repeated = []
    for task in tasks:
        keys = set(read_json(task.record_path)["keys"])
        if clash := keys & seen:
            repeated.append(Task(task.directory, task.config, task.seed, task.part, frozenset(clash)))
        seen |= keys
    return repeated


def _join(directory: Path, config: PrepareConfig, tasks: list[Task]) -> dict[str, Any]:
    """Put the records of all parts together: rejected.jsonl, contact sheet, index.json (last)."""
    records = [read_json(task.record_path) for task in tasks]
    splits: dict[str, Any] = {}
    for split in SPLITS:
        shards = [record["shards"][split] for record in records if split in record["shards"]]
        totals = {name: sum(shard[name] for shard in shards) for name in ("samples", "bytes")}
        splits[split] = {**totals, "shards": shards}
    rejected = [entry for record in records for entry in record["rejected"]]
    conversions: Counter[str] = Counter()
    for record in records:
        conversions.update(record["conversions"])
    reasons = dict(sorted(Counter(entry["reason"] for entry in rejected).items()))
    write_atomic(directory / "rejected.jsonl", "".join(json.dumps(entry) + "\n" for entry in rejected))
    kept = splits["train"]["samples"] + splits["val"]["samples"]
    _check_rejected(directory, config, kept, len(rejected), reasons)
    _remove_strangers(directory, splits, tasks)
    if splits["train"]["samples"] == 0:
        raise UserError(f"prepare: expected training samples, found none; {directory / 'rejected.jsonl'} says why")
    write_contact_sheet(directory, [Shard(**shard) for shard in splits["train"]["shards"]])
    index = {
        "image_size": config.image_size,
        "splits": splits,
        "rejected": {"samples": len(rejected), "reasons": reasons},
        "conversions": dict(sorted(conversions.items())),
    }
    write_json(directory / "index.json", index)
    return index


def _check_rejected(directory: Path, config: PrepareConfig, kept: int, rejected: int, reasons: dict[str, int]) -> None:
    if rejected > config.max_rejected_fraction * (kept + rejected):
        counted = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
        raise UserError(
            f"prepare: {rejected} of {kept + rejected} samples rejected ({counted}), at most "
            f"{config.max_rejected_fraction:.0%} allowed: see {directory / 'rejected.jsonl'}, mend the source or raise "
            "prepare.max_rejected_fraction"
        )


def _remove_strangers(directory: Path, splits: dict[str, Any], tasks: list[Task]) -> None:
    """Shards and records of an earlier config or source are no part of the result."""
    wanted = {task.record_path for task in tasks}
    for split in SPLITS:
        for shard in splits[split]["shards"]:
            path = directory / shard["name"]
            wanted |= {path, path.with_suffix(".index.npy")}
    for folder in ("parts", *SPLITS):
        for path in sorted((directory / folder).glob("*")):
            if path not in wanted:
                path.unlink()


def write_contact_sheet(directory: Path, shards: list[Shard]) -> None:
    """contact-sheet.png: training pictures from everywhere in the source, for a look."""
    order = ShardOrder([shard.samples for shard in shards], seed=0)
    places = zip(*order.locate(np.arange(min(_SHEET_SIDE**2, order.samples))), strict=True)
    pictures = [Image.open(io.BytesIO(read_png(directory / shards[shard].name, row))) for shard, row in places]
    content = io.BytesIO()
    grid(pictures, _SHEET_SIDE).save(content, "PNG")
    write_atomic(directory / "contact-sheet.png", content.getvalue())
