"""One part of a source -> at most one image shard of each split, and the record that vouches for them.

The record, `parts/000000.json`, is written last and says what became of every sample. A part whose record belongs to
today's config and source, and whose files are as recorded, is finished and not made again.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NotRequired, TypedDict

import numpy as np

from pipeline.config.base import digest, identity
from pipeline.config.prepare import NO_LONGER_DECIDES, PrepareConfig
from pipeline.core.atomic_io import atomic_path, read_json, sha256_file, write_json
from pipeline.core.errors import StoppedOnRequest, UserError
from pipeline.core.manifest import Fault, FileRecord, first_fault
from pipeline.core.seeds import random_of
from pipeline.core.urls import mask
from pipeline.data import stored_image
from pipeline.data.catalog_columns import key_hash, save_columns
from pipeline.data.images import BadSample, cropped, decode, perceptual_hash
from pipeline.data.part_files import PartFiles, part_files
from pipeline.data.prepare_caption import caption_text, captions_of
from pipeline.data.remote_file import is_remote
from pipeline.data.shard_table import ShardEntry, part_name
from pipeline.data.shards import Sample, Shard, index_path, read_shard
from pipeline.data.sources import open_source
from pipeline.data.sources.base import Counted, LeftOut, Part, Record, Source, Unreadable, fault
from pipeline.data.sources.webdataset import tar_of
from pipeline.data.splits import split_of
from pipeline.data.stored_image import Cut

_FORMAT = 3  # of the shards and records: parts of another format are made again
_EARLIER = {  # reasons to leave a sample out that only the other samples tell
    "duplicate key": "an earlier sample has the same key",
    "near-duplicate": "an earlier image looks the same (filters.near_duplicate_bits)",
}

# A worker process opens the source once, not once per part.
opened_source = lru_cache(maxsize=None)(open_source)


class Rejection(TypedDict):
    """A line of rejected.jsonl."""

    key: str
    reason: str
    detail: str
    samples: NotRequired[int]  # how many it holds, where that is not one
    source: NotRequired[str]  # which of several
    rest: NotRequired[bool]  # holds, besides, what the part lacks of what a part of this source holds


class HashFile(TypedDict):
    """What is recorded of a part's file of hashes."""

    samples: int
    sha256: str


class PartRecord(TypedDict):
    """What became of a part."""

    fingerprint: str
    without: dict[str, str]  # hash of a key (hexadecimal) -> reason: samples that were left out
    hashes: HashFile
    conversions: dict[str, int]
    rejected: list[Rejection]
    shards: dict[str, ShardEntry]  # by split
    indexes: dict[str, str]  # split -> SHA-256 of the shard's .index.npy
    columns: NotRequired[str]  # SHA-256 of the columns for the catalog; missing: an earlier version made none
    left_out: list[Rejection]
    found: int  # samples, as the source counts them, and further captions
    passed_over: dict[str, int]  # reason -> samples that the source's rules leave out


@dataclass(frozen=True)
class PartTask:
    """What a worker needs to make the shards of a part."""

    directory: Path
    config: PrepareConfig  # of this source alone
    seed: int
    part: Part
    source: int = 0  # which of several
    # Hash of a key (hexadecimal) -> why that sample is left out; None: not known yet, whatever is there will do.
    without: dict[str, str] | None = None

    @property
    def record_path(self) -> Path:
        """The file of the part's `PartRecord`."""
        return self.directory / "parts" / f"{part_name(self.source, self.part.number)}.json"

    @property
    def hashes_path(self) -> Path:
        """uint64 [samples, 2] in the part's own order: of the key, of the image; also of samples left out."""
        return self.record_path.with_suffix(".hashes.npy")

    @property
    def columns_path(self) -> Path:
        """The columns of the part's samples, for the catalog."""
        return self.record_path.with_suffix(".columns.npz")

    @property
    def fingerprint(self) -> str:
        """The hash of all that decides the part's files, but for `without`."""
        return self._hash(NO_LONGER_DECIDES)

    @property
    def earlier_fingerprint(self) -> str:
        """What an earlier version called `fingerprint`."""
        return self._hash({name: getattr(self.config, name) for name in NO_LONGER_DECIDES})

    def _hash(self, no_longer_decides: dict[str, object]) -> str:
        config = identity(self.config) | no_longer_decides
        of_source: list[object] = [self.source] if self.source else []  # which is in its keys
        source = self.config.all_sources[0]
        if getattr(source, "group_column", None) or getattr(source, "group_field", None):
            of_source.append("a blank group is none")  # it was one, of all such samples
        return digest([_FORMAT, self.part.fingerprint, config, self.seed, *of_source])

    def opened(self) -> Source:
        """The part's source; this process opens it once."""
        return opened_source(self.config.all_sources[0], self.config.image_size)

    def key(self, key: str) -> str:
        """A sample's key among those of all sources: what one has called 000000000, another may have, too."""
        return f"source-{self.source}/{key}" if self.source else key

    def record(self) -> PartRecord:
        """The record of a part that was made."""
        record: PartRecord = read_json(self.record_path)
        return record


def make_part(task: PartTask) -> int:
    """Make the shards of one part and its record, unless they are there. Returns how many samples the part holds."""
    record = _finished_record(task)
    if record is None:
        return _make_from_source(task, task.without or {})
    without = record["without"] if task.without is None else task.without
    is_read = without != record["without"] or "columns" not in record
    if (is_read or task.config.verify) and _fault_of_shards(task, record, hashed=True):
        return _make_from_source(task, task.without or {})
    if without != record["without"]:
        # A sample that was left out is wanted again, or there is nothing but the source to read from.
        if not record["without"].items() <= without.items() or task.config.storage == "in-place":
            return _make_from_source(task, without)
        _leave_out(task, record, without)
    elif "columns" not in record:  # made by a version that had no catalog: all that it needs is in the shards
        samples = {split: read_shard(task.directory, Shard(**entry)) for split, entry in record["shards"].items()}
        write_json(task.record_path, {**record, "columns": save_columns(task.columns_path, samples)})
    return record["hashes"]["samples"]


def safe_key(key: str) -> str:
    """`key` as a member name of a tar that any WebDataset reader takes for one key: no folders, no dots."""
    printable = "".join(c if c.isprintable() and not 0xD800 <= ord(c) < 0xE000 else f"%{ord(c):02X}" for c in key)
    escaped = printable.replace("/", "%2F").replace(".", "%2E")
    # Readers skip members that begin with two underscores.
    return "%5F" + escaped[1:] if escaped.startswith("_") else escaped


def _finished_record(task: PartTask) -> PartRecord | None:
    """The record of the part if it is of today's config and source, and its files are as it says; else None.

    Of the tars only the sizes are compared: whoever reads an image compares its own checksum.
    """
    if not task.record_path.is_file():
        return None
    record = task.record()
    if record["fingerprint"] not in (task.fingerprint, task.earlier_fingerprint):
        return None
    files: dict[str, FileRecord] = {f"parts/{task.hashes_path.name}": {"sha256": record["hashes"]["sha256"]}}
    for split, entry in record["shards"].items():
        files[index_path(Path(entry["name"])).as_posix()] = {"sha256": record["indexes"][split]}
    if "columns" in record:
        files[f"parts/{task.columns_path.name}"] = {"sha256": record["columns"]}
    fault = first_fault(task.directory, files) or _fault_of_shards(task, record, hashed=False)
    return record if fault is None else None


def _fault_of_shards(task: PartTask, record: PartRecord, *, hashed: bool) -> Fault | None:
    """The first tar of the part that is not as recorded."""
    files: dict[str, FileRecord] = {}
    for entry in record["shards"].values():
        if is_remote(entry.get("tar", "")):
            continue  # asked for by the stamp in the part's fingerprint
        if "tar" in entry:  # the user's, of which the part's fingerprint has a stamp
            hashed = False
            files[entry["tar"]] = {"bytes": entry["tar_bytes"], "sha256": ""}
        else:
            files[entry["name"]] = {"bytes": entry["bytes"], "sha256": entry["sha256"]}
    return first_fault(task.directory, files, hashed=hashed)


def _make_from_source(task: PartTask, without: dict[str, str]) -> int:
    tar = tar_of(task.part) if task.config.storage == "in-place" else None
    with part_files(task.directory, task.record_path.stem, tar) as files:
        making = _Making(task, without, files)
        counted = 0
        for item in task.opened().records(task.part):
            if isinstance(item, Counted):
                counted += item.samples
            else:
                making.take(item)
        making.check(counted)
    with atomic_path(task.hashes_path) as temporary, open(temporary, "wb") as file:
        np.save(file, np.array([*making.hashes.items()], dtype=np.uint64).reshape(-1, 2))
    part_record: PartRecord = {
        "fingerprint": task.fingerprint,
        "without": without,
        "hashes": {"samples": len(making.hashes), "sha256": sha256_file(task.hashes_path)},
        "conversions": dict(sorted(making.conversions.items())),
        "rejected": making.rejected,
        "shards": {},
        "indexes": {},
        "left_out": making.left_out,
        "found": making.found,
        "passed_over": dict(sorted(making.passed_over.items())),
    }
    _write_record(task, files, part_record)
    return len(making.hashes)


class _Making:
    """What becomes of the records of a part: each is kept, rejected, or left out."""

    def __init__(self, task: PartTask, without: dict[str, str], files: PartFiles) -> None:
        self.task, self.without, self.files = task, without, files
        self.rejected: list[Rejection] = []
        self.left_out: list[Rejection] = []
        self.passed_over: Counter[str] = Counter()
        self.conversions: Counter[str] = Counter()
        self.hashes: dict[int, int] = {}  # of keys -> of images
        self.found = 0
        self._further_captions = 0  # of images that were counted as one

    def take(self, item: Record | Unreadable | LeftOut) -> None:
        """Decide about one record."""
        if isinstance(item, LeftOut):
            self.found += item.samples
            self.passed_over[item.reason] += item.samples
        elif isinstance(item, Unreadable):
            self.found += item.samples
            entry: Rejection = {"key": item.key, "reason": item.reason, "detail": mask(item.detail)}
            if item.samples != 1:
                entry["samples"] = item.samples
            if item.rest:
                entry["rest"] = True
            self.rejected.append(entry)
        else:
            self._take_record(item)

    def check(self, counted: int) -> None:
        """Compare with what the source counts by itself.

        Raises:
            UserError: a sample was lost without a word, which is a mistake of ours.
        """
        accounted = self.found - self._further_captions
        if accounted != counted:
            raise UserError(
                f"prepare: part {self.task.part.number} of the source holds {counted} samples, and {accounted} are "
                "accounted for: please report this, with a file that does it"
            )

    def _take_record(self, record: Record) -> None:
        found = 1
        try:
            captions = captions_of(record.caption, self.task.config.caption)
            found = len(captions)
            decoded = decode_record(record, self.task)
        except BadSample as bad:
            self._reject(record, record.key, bad, found)
            captions = []
        self.found += found
        self._further_captions += found - 1
        together: list[str] = []  # captions of one sample
        for number, raw in enumerate(captions):
            key = record.key if not number else f"{record.key}-caption-{number + 1}"
            try:
                text = caption_text(raw, self.task.config.filters)
                if self.task.config.caption == "random":
                    together.append(text)
                else:
                    self._keep(record, key, [text], decoded)
            except BadSample as bad:
                self._reject(record, key, bad)
        if together:
            try:
                self._keep(record, record.key, together, decoded)
            except BadSample as bad:
                self._reject(record, record.key, bad, len(together))

    def _keep(self, record: Record, key: str, captions: list[str], decoded: _Stored) -> None:
        further = tuple(captions[1:])
        sample = Sample(
            safe_key(self.task.key(key)), decoded.encoded, captions[0], record.meta, further, decoded.cut, record.offset
        )
        hashed = key_hash(sample.key)
        if hashed in self.hashes:
            raise BadSample("duplicate key", _EARLIER["duplicate key"])
        self.hashes[hashed] = decoded.hash
        if reason := self.without.get(f"{hashed:016x}"):
            self.left_out.append(_left_out(sample, reason))
            return
        self.conversions.update(decoded.conversions)
        # All captions of an image are in its split, which the key of the first one decides, in all sources alike.
        group = safe_key(record.key) if record.group is None else record.group
        self.files.add(split_of(sample.key, group, self.task.config.validation_fraction), sample)

    def _reject(self, record: Record, key: str, bad: BadSample, samples: int = 1) -> None:
        detail = "; ".join(text for text in (record.where, bad.detail) if text)
        entry: Rejection = {"key": key, "reason": bad.reason, "detail": mask(detail)}
        if samples != 1:
            entry["samples"] = samples
        self.rejected.append(entry)


def _leave_out(task: PartTask, record: PartRecord, without: dict[str, str]) -> None:
    """Write the shards of a finished part again without some of their samples."""
    left_out = list(record["left_out"])
    with part_files(task.directory, task.record_path.stem) as files:
        for split, entry in record["shards"].items():
            for sample in read_shard(task.directory, Shard(**entry)):
                if reason := without.get(f"{key_hash(sample.key):016x}"):
                    left_out.append(_left_out(sample, reason))
                else:
                    files.add(split, sample)
    _write_record(task, files, {**record, "without": without, "left_out": left_out})


def _write_record(task: PartTask, files: PartFiles, record: PartRecord) -> None:
    """Write `record` with what the shards are, after the columns of their samples."""
    columns = save_columns(task.columns_path, {split: samples for split, samples in files.kept.items() if samples})
    left_out = sorted(record["left_out"], key=lambda entry: entry["key"])
    made = {"shards": files.shards, "indexes": files.indexes, "columns": columns, "left_out": left_out}
    write_json(task.record_path, {**record, **made})


def _left_out(sample: Sample, reason: str) -> Rejection:
    entry: Rejection = {"key": sample.key, "reason": reason, "detail": _EARLIER[reason]}
    if sample.further:
        entry["samples"] = len(sample.captions)
    return entry


@dataclass(frozen=True)
class _Stored:
    """An image that is good enough to keep, as it is stored."""

    encoded: bytes
    cut: Cut | None  # where the file stays as it is
    conversions: tuple[str, ...]  # what was changed to make it an RGB image
    hash: int  # 0: nobody asked for it


def decode_record(record: Record, task: PartTask) -> _Stored:
    """Decode, check, crop and resize the image of a record.

    Raises:
        BadSample: it cannot be used. Whatever a decoder raises is this image's fault, and not the end of the stage.
    """
    try:
        return _decoded(record, task)
    except (BadSample, UserError, StoppedOnRequest, MemoryError):
        raise
    except Exception as error:
        raise BadSample("unusable sample", fault(error)) from error


def _decoded(record: Record, task: PartTask) -> _Stored:
    config = task.config
    where = (0.5, 0.5)
    if config.crop == "random":
        rng = random_of("crop", task.seed, record.key)
        where = (rng.random(), rng.random())
    if config.storage in ("png", "webp"):
        decoded = decode(record.image, record.extension, config.filters)
        image, cut = cropped(decoded.image, config.image_size, where), None
    else:  # a JPEG is not decoded to more pixels than are needed
        decoded = decode(record.image, record.extension, config.filters, at_least=config.image_size)
        cut = Cut.largest(decoded.whole, config.image_size, where)
        image = stored_image.resized(decoded, cut)
    try:
        json.dumps(record.meta)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadSample("metadata is not JSON", fault(error)) from error
    image_hash = 0 if config.filters.near_duplicate_bits is None else perceptual_hash(image)
    if config.storage == "in-place":
        return _Stored(record.image or b"", cut, decoded.conversions, image_hash)
    encoded = stored_image.encode(image, config.storage, config.jpeg_quality)
    return _Stored(encoded, None, decoded.conversions, image_hash)
