"""A source -> image shards. Part after part, in worker processes; what is finished is never done again.

Each part of the source becomes at most one shard of each split and one record in `parts/`, written last, that says what
became of every sample. A run that was killed finds these records, checks that they belong to today's config and source
and that the shards are as recorded, and does only the other parts. The result is a function of config and source alone,
so it has the same bytes however often it was interrupted and however many workers made it.

Whether an earlier part has the same key or image is known when all parts are made. So each leaves its hashes in
`parts/`, `duplicates.py` compares them, and the parts that hold duplicates are written again without them.
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
from dataclasses import dataclass, replace
from functools import lru_cache
from multiprocessing import connection
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.config.base import digest, identity
from pipeline.config.prepare import PrepareConfig
from pipeline.core import signals
from pipeline.core.atomic_io import atomic_path, read_json, sha256_file, write_atomic, write_json
from pipeline.core.errors import StoppedOnRequest, UserError
from pipeline.core.progress import progress
from pipeline.data import png
from pipeline.data.duplicates import KEY, same_image, same_key
from pipeline.data.images import BadSample, decode, grid, perceptual_hash, random_of, square
from pipeline.data.order import ShardOrder, key_of
from pipeline.data.shards import SPLITS, Sample, Shard, ShardFile, read_shard, write_shard
from pipeline.data.sources import open_source
from pipeline.data.sources.base import Part, Record, Unreadable

_SHEET_SIDE = 12  # images a side of the contact sheet
_FORMAT = 2  # of the shards and records: parts of another format are made again
_EARLIER = {
    "duplicate key": "an earlier sample has the same key",
    "near-duplicate": "an earlier image looks the same (filters.near_duplicate_bits)",
}


@dataclass(frozen=True)
class Task:
    """What a worker needs to make the shards of a part."""

    directory: Path
    config: PrepareConfig
    seed: int
    part: Part
    # Hash of a key (hexadecimal) -> why that sample is left out; None: not known yet, whatever is there will do.
    without: dict[str, str] | None = None

    @property
    def record_path(self) -> Path:
        return self.directory / "parts" / f"{self.part.number:06d}.json"

    @property
    def hashes_path(self) -> Path:
        """uint64 [samples, 2] in the part's own order: of the key, of the image; also of samples left out."""
        return self.directory / "parts" / f"{self.part.number:06d}.hashes.npy"

    @property
    def fingerprint(self) -> str:
        return digest([_FORMAT, self.part.fingerprint, identity(self.config), self.seed])


def prepare(directory: Path, config: PrepareConfig, seed: int) -> dict[str, Any]:
    """Make (or finish) the image shards in `directory`; returns the index, which is also in index.json.

    Raises:
        UserError: the source is not usable or went away, no sample is left, or too many were rejected.
        StoppedOnRequest: asked to stop; finished parts are kept.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for leftover in directory.rglob(".*.tmp"):
        leftover.unlink()
    _opened.cache_clear()
    tasks = [
        Task(directory, config, seed, part)
        for part in _opened(config.source, config.image_size).parts(config.shard_size)
    ]
    _run(tasks, config.workers, "prepare")
    repeated = _with_duplicates(tasks, config.filters.near_duplicate_bits)
    if repeated:
        _run(repeated, config.workers, "prepare: without duplicates")
    return _join(directory, config, tasks)


# A worker process opens the source once, not once a part.
_opened = lru_cache(maxsize=1)(open_source)


def split_of(key: str, validation_fraction: float) -> str:
    """The split of a sample: a stable hash of its key or group alone, so that it never moves when samples are added."""
    return "val" if key_of("split", key) < validation_fraction * 2**64 else "train"


def safe_key(key: str) -> str:
    """`key` as a member name of a tar that any WebDataset reader takes for one key: no folders, no dots."""
    printable = "".join(c if c.isprintable() and not 0xD800 <= ord(c) < 0xE000 else f"%{ord(c):02X}" for c in key)
    escaped = printable.replace("/", "%2F").replace(".", "%2E")
    # Readers skip members that begin with two underscores.
    return "%5F" + escaped[1:] if escaped.startswith("_") else escaped


# --- one part, in a worker ---------------------------------------------------------------------------------------


def make_part(task: Task) -> int:
    """Make the shards of one part and its record, unless they are there. Returns how many samples the part holds."""
    record = _finished_record(task)
    if record is None:
        return _make_from_source(task, task.without or {})
    if task.without is not None and task.without != record["without"]:
        if not record["without"].items() <= task.without.items():  # a sample that was left out is wanted again
            return _make_from_source(task, task.without)
        _leave_out(task, record, task.without)
    return int(record["hashes"]["samples"])


def _make_from_source(task: Task, without: dict[str, str]) -> int:
    kept: dict[str, list[Sample]] = {split: [] for split in SPLITS}
    rejected: list[dict[str, str]] = []
    left_out: list[dict[str, str]] = []
    conversions: Counter[str] = Counter()
    hashes: dict[int, int] = {}  # of keys -> of images
    for record in _opened(task.config.source, task.config.image_size).records(task.part):
        try:
            sample, split, changed, image_hash = _sample(record, task)
            key_hash = key_of("key", sample.key)
            if key_hash in hashes:
                raise BadSample("duplicate key", "an earlier sample has the same key")
        except BadSample as bad:
            rejected.append(_rejection(record.key, bad.reason, bad.detail))
            continue
        hashes[key_hash] = image_hash
        if reason := without.get(f"{key_hash:016x}"):
            left_out.append(_rejection(sample.key, reason, _EARLIER[reason]))
            continue
        conversions.update(changed)
        kept[split].append(sample)
    with atomic_path(task.hashes_path) as temporary, open(temporary, "wb") as file:
        np.save(file, np.array([*hashes.items()], dtype=np.uint64).reshape(-1, 2))
    record_of_part = {
        "fingerprint": task.fingerprint,
        "without": without,
        "hashes": {"samples": len(hashes), "sha256": sha256_file(task.hashes_path)},
        "conversions": dict(sorted(conversions.items())),
        "rejected": rejected,
    }
    _write(task, kept, record_of_part, left_out)
    return len(hashes)


def _leave_out(task: Task, record: dict[str, Any], without: dict[str, str]) -> None:
    """Write the shards of a finished part again without some of their samples."""
    kept: dict[str, list[Sample]] = {split: [] for split in SPLITS}
    left_out: list[dict[str, str]] = record["left_out"]
    for split, shard in record["shards"].items():
        for sample in read_shard(task.directory, Shard(**shard)):
            if reason := without.get(f"{key_of('key', sample.key):016x}"):
                left_out.append(_rejection(sample.key, reason, _EARLIER[reason]))
            else:
                kept[split].append(sample)
    _write(task, kept, record | {"without": without}, left_out)


def _write(task: Task, kept: dict[str, list[Sample]], record: dict[str, Any], left_out: list[dict[str, str]]) -> None:
    """Write the shards, and then the record that vouches for them."""
    shards: dict[str, dict[str, Any]] = {}
    indexes: dict[str, str] = {}
    for split, samples in kept.items():
        path = task.directory / split / f"{task.part.number:06d}.tar"
        if samples:
            count, size, sha256 = write_shard(path, samples)
            shards[split] = {"name": f"{split}/{path.name}", "samples": count, "bytes": size, "sha256": sha256}
            indexes[split] = sha256_file(path.with_suffix(".index.npy"))
    in_order = sorted(left_out, key=lambda entry: entry["key"])
    write_json(task.record_path, record | {"shards": shards, "indexes": indexes, "left_out": in_order})


def _rejection(key: str, reason: str, detail: str) -> dict[str, str]:
    return {"key": key, "reason": reason, "detail": detail}


def _sample(record: Record | Unreadable, task: Task) -> tuple[Sample, str, tuple[str, ...], int]:
    """(sample, its split, what was converted, hash of the image). Raises BadSample."""
    if isinstance(record, Unreadable):
        raise BadSample(record.reason, record.detail)
    config = task.config
    caption = _caption(record.caption, config)
    decoded = decode(record.image, record.extension, config.filters)
    where = (0.5, 0.5)
    if config.crop == "random":
        rng = random_of("crop", task.seed, record.key)
        where = (rng.random(), rng.random())
    image = square(decoded.image, config.image_size, where)
    try:
        json.dumps(record.meta)
    except (TypeError, ValueError) as error:
        raise BadSample("metadata is not JSON", str(error)) from error
    sample = Sample(safe_key(record.key), png.encode(image), caption, record.meta)
    split = split_of(sample.key if record.group is None else record.group, config.validation_fraction)
    looks = 0 if config.filters.near_duplicate_bits is None else perceptual_hash(image)
    return sample, split, decoded.conversions, looks


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


def _run(tasks: list[Task], workers: int | None, what: str) -> None:
    """Make the parts that are not finished yet. Workers also check those that are: hashing takes its time."""
    workers = min(workers or len(os.sched_getaffinity(0)), len(tasks))
    bar: Any = progress(total=len(tasks), description=what, unit="shard")
    with bar:
        for count in map(make_part, tasks) if workers <= 1 else _in_processes(tasks, workers):
            bar.set_postfix_str(f"{count} samples in the last")
            bar.update(1)
            signals.check()


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
            signals.check()
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


def _finished_record(task: Task) -> dict[str, Any] | None:
    """The record of the part if it is of today's config and source, and its files are as it says; else None."""
    if not task.record_path.is_file():
        return None
    record: dict[str, Any] = read_json(task.record_path)
    if record["fingerprint"] != task.fingerprint:
        return None
    expected = {task.hashes_path: record["hashes"]["sha256"]}
    for split, shard in record["shards"].items():
        tar = task.directory / shard["name"]
        expected |= {tar: shard["sha256"], tar.with_suffix(".index.npy"): record["indexes"][split]}
    if not all(path.is_file() and sha256_file(path) == sha256 for path, sha256 in expected.items()):
        return None
    return record


def _with_duplicates(tasks: list[Task], near_bits: int | None) -> list[Task]:
    """Tasks that must be done again because samples of theirs repeat earlier ones, or because they no longer do."""
    counts, left_out_now = [], []
    for task in tasks:
        record = read_json(task.record_path)
        counts.append(record["hashes"]["samples"])
        left_out_now.append(len(record["without"]))
    files = [task.hashes_path for task in tasks]
    repeated = same_key(files, counts)
    reasons = dict.fromkeys(repeated.tolist(), "duplicate key")
    if near_bits is not None:
        reasons |= dict.fromkeys(same_image(files, near_bits, repeated).tolist(), "near-duplicate")
    numbers = np.array(sorted(reasons), dtype=np.int64)
    starts = np.cumsum([0, *counts])
    bounds = np.searchsorted(numbers, starts).tolist()
    again = []
    for index, task in enumerate(tasks):
        mine = numbers[bounds[index] : bounds[index + 1]]
        if len(mine) or left_out_now[index]:
            keys = np.load(task.hashes_path)[mine - starts[index], KEY].tolist()
            without = {f"{key:016x}": reasons[number] for key, number in zip(keys, mine.tolist(), strict=True)}
            again.append(replace(task, without=without))
    return again


def _join(directory: Path, config: PrepareConfig, tasks: list[Task]) -> dict[str, Any]:
    """Put the records of all parts together: rejected.jsonl, contact sheet, index.json (last)."""
    splits: dict[str, Any] = {split: {"samples": 0, "bytes": 0, "shards": []} for split in SPLITS}
    conversions: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    with atomic_path(directory / "rejected.jsonl") as temporary, open(temporary, "w") as file:
        for task in tasks:
            record = read_json(task.record_path)
            for split, shard in record["shards"].items():
                splits[split]["shards"].append(shard)
                splits[split]["samples"] += shard["samples"]
                splits[split]["bytes"] += shard["bytes"]
            conversions.update(record["conversions"])
            for entry in record["rejected"] + record["left_out"]:
                reasons[entry["reason"]] += 1
                file.write(json.dumps(entry) + "\n")
    rejected = {"samples": reasons.total(), "reasons": dict(sorted(reasons.items()))}
    _check_rejected(directory, config, splits["train"]["samples"] + splits["val"]["samples"], rejected)
    _remove_strangers(directory, splits, tasks)
    if splits["train"]["samples"] == 0:
        raise UserError(f"prepare: expected training samples, found none; {directory / 'rejected.jsonl'} says why")
    write_contact_sheet(directory, [Shard(**shard) for shard in splits["train"]["shards"]])
    index = {
        "image_size": config.image_size,
        "splits": splits,
        "rejected": rejected,
        "conversions": dict(sorted(conversions.items())),
        "credit": _opened(config.source, config.image_size).credit,
    }
    write_json(directory / "index.json", index)
    return index


def _check_rejected(directory: Path, config: PrepareConfig, kept: int, rejected: dict[str, Any]) -> None:
    count = rejected["samples"]
    if count > config.max_rejected_fraction * (kept + count):
        counted = ", ".join(f"{number} {reason}" for reason, number in rejected["reasons"].items())
        raise UserError(
            f"prepare: {count} of {kept + count} samples rejected ({counted}), at most "
            f"{config.max_rejected_fraction:.0%} allowed: see {directory / 'rejected.jsonl'}, mend the source or raise "
            "prepare.max_rejected_fraction"
        )


def _remove_strangers(directory: Path, splits: dict[str, Any], tasks: list[Task]) -> None:
    """Shards and records of an earlier config or source are no part of the result."""
    wanted = {path for task in tasks for path in (task.record_path, task.hashes_path)}
    for split in SPLITS:
        for shard in splits[split]["shards"]:
            path = directory / shard["name"]
            wanted |= {path, path.with_suffix(".index.npy")}
    for folder in ("parts", *SPLITS):
        for path in sorted((directory / folder).glob("*")):
            if path not in wanted:
                path.unlink()


def write_contact_sheet(directory: Path, shards: list[Shard]) -> None:
    """contact-sheet.png: training images from everywhere in the source, for a look."""
    order = ShardOrder([shard.samples for shard in shards], seed=0)
    places = zip(*order.locate(np.arange(min(_SHEET_SIDE**2, order.samples))), strict=True)
    images = [_image(directory, shards[shard], row) for shard, row in places]
    content = io.BytesIO()
    grid(images, _SHEET_SIDE).save(content, "PNG")
    write_atomic(directory / "contact-sheet.png", content.getvalue())


def _image(directory: Path, shard: Shard, row: int) -> Image.Image:
    return Image.fromarray(png.decode(ShardFile(directory / shard.name, shard).read(row)).transpose(1, 2, 0))
