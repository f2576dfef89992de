"""The columns of the catalog (`catalog.py`): each part of the source leaves its own, and they are put end to end.

A part's columns are a `.npz` beside its record; for each split, "train/keys" and so on:

    keys, captions              uint8: UTF-8, one after the other
    key_sizes, caption_sizes    int64: bytes of each
    caption_counts              int64 [samples]: captions of each sample
    key_hashes, caption_hashes  uint64
    number.NAME                 float64 [samples]: a number of KEY.json
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.core.atomic_io import atomic_path, fsync_file, sha256_file
from pipeline.core.seeds import hash64
from pipeline.core.text import clean_text
from pipeline.data.checked_file import CheckedWriter
from pipeline.data.shards import CatalogEntry, Sample
from pipeline.data.spilled import leading_bits

Column = NDArray[np.uint8] | NDArray[np.int64] | NDArray[np.uint64] | NDArray[np.float64]
Columns = Mapping[str, Column]
Parts = Callable[[], Iterator[Columns]]  # a split's columns of each part, as often as it is called

log = logging.getLogger(__name__)

FOLDER = "catalog"
WORD = 8  # bytes of every number in the columns
NUMBER = "number."  # what the columns of numbers begin with
_NAME = re.compile(r"\w{1,64}", re.ASCII)  # of numbers that become a column
_NUMBERS = 32  # columns of numbers, at most: those that most parts have
_LOOKUP_SLICE = 1 << 24  # hashes that are sorted at a time


class Sink(Protocol):
    """Where a column is written to."""

    @property
    def size(self) -> int:
        """Bytes so far."""

    def write(self, content: bytes, /) -> None:
        """Append."""


def key_hash(key: str) -> int:
    """What `known_keys` knows a key by."""
    return hash64("key", key)


def caption_hash(caption: str) -> int:
    """What `known_captions` knows a caption by."""
    return hash64("caption", plain_caption(caption))


def plain_caption(caption: str) -> str:
    """The same for captions that differ in case and spaces alone."""
    return clean_text(caption).lower()


def columns_of(samples: Iterable[Sample]) -> dict[str, Column]:
    """The columns of a part."""
    keys: list[bytes] = []
    captions: list[bytes] = []
    counts: list[int] = []
    hashes: list[int] = []
    numbers: dict[str, dict[int, float]] = {}
    for row, sample in enumerate(samples):
        keys.append(sample.key.encode())
        counts.append(len(sample.captions))
        captions += [caption.encode() for caption in sample.captions]
        hashes += map(caption_hash, sample.captions)
        for name, value in _numbers_of(sample):
            numbers.setdefault(name, {})[row] = value
    columns: dict[str, Column] = {
        "keys": np.frombuffer(b"".join(keys), np.uint8),
        "key_sizes": np.array([len(key) for key in keys], np.int64),
        "key_hashes": np.array([key_hash(key.decode()) for key in keys], np.uint64),
        "captions": np.frombuffer(b"".join(captions), np.uint8),
        "caption_sizes": np.array([len(caption) for caption in captions], np.int64),
        "caption_hashes": np.array(hashes, np.uint64),
        "caption_counts": np.array(counts, np.int64),
    }
    for name, found in sorted(numbers.items()):
        column = np.full(len(keys), np.nan)
        column[list(found)] = list(found.values())
        columns[NUMBER + name] = column
    return columns


def _numbers_of(sample: Sample) -> Iterator[tuple[str, float]]:
    for name, value in sample.meta.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool) and _NAME.fullmatch(name):
            try:
                yield name, float(value)
            except OverflowError:  # an integer of hundreds of digits is no score
                continue


def save_columns(path: Path, samples: Mapping[str, Iterable[Sample]]) -> str:
    """Write the columns of a part's samples of each split, atomically; the SHA-256 of the file."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        columns = {f"{split}/{name}": c for split, own in samples.items() for name, c in columns_of(own).items()}
        np.savez(file, allow_pickle=False, **columns)
    return sha256_file(path)


class _OfSplit(Mapping[str, Column]):
    """The columns of one split in the file of a part; each is read when it is asked for."""

    def __init__(self, file: Mapping[str, Column], split: str) -> None:
        self._file, self._prefix = file, f"{split}/"

    def __getitem__(self, name: str) -> Column:
        return self._file[self._prefix + name]

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(self._prefix) for name in self._file if name.startswith(self._prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def saved_columns(files: Sequence[Path], split: str) -> Iterator[Columns]:
    """A split's columns of each part, from the files that `save_columns` wrote."""
    for path in files:
        with np.load(path, allow_pickle=False) as columns:
            yield _OfSplit(columns, split)


def write_catalog(directory: Path, split: str, parts: Parts) -> CatalogEntry:
    """Write a split's columns to `directory`/catalog, from those of its parts; what index.json says of them.

    Memory is that of one part and of `_LOOKUP_SLICE` hashes, whatever the split holds. The columns mean nothing without
    their checksums, which come last; so they wait for the disk together, and not each by itself.
    """
    writers: dict[str, CheckedWriter] = {}
    path = directory / FOLDER / f"{split}.checksums"

    def open_column(name: str) -> CheckedWriter:
        writers[name] = CheckedWriter(path.with_name(f"{split}.{name}"))
        return writers[name]

    with atomic_path(path) as temporary, ThreadPoolExecutor() as pool:
        put_together(parts, open_column)
        checksums = [writers[name].close() for name in sorted(writers)]
        temporary.write_bytes(np.concatenate(checksums).astype("<u4").tobytes())
        list(pool.map(fsync_file, [writer.path for writer in writers.values()]))
    return {"bytes": {name: writers[name].size for name in sorted(writers)}, "sha256": sha256_file(path)}


def put_together(parts: Parts, open_column: Callable[[str], Sink]) -> None:
    """Write every column of a split: the columns of its parts end to end, and the lookups of all of them."""
    several, names = False, Counter[str]()
    for columns in parts():
        several |= bool((_integers(columns, "caption_counts") != 1).any())
        names.update(name for name in columns if name.startswith(NUMBER))
    written = sorted(names, key=lambda name: (-names[name], name))[:_NUMBERS]
    if len(names) > len(written):
        log.info("prepare: of %d kinds of numbers in the metadata, the catalog has %d", len(names), len(written))
    sinks = {name: open_column(name) for name in ("keys", "captions", "keys.ends", "captions.ends", *sorted(written))}
    if several:
        sinks["rows"] = open_column("rows")
    for columns in parts():
        captions = sinks["captions.ends"].size // WORD
        for text, sizes in (("keys", "key_sizes"), ("captions", "caption_sizes")):
            ends = sinks[text].size + np.cumsum(_integers(columns, sizes))
            sinks[text].write(columns[text].tobytes())
            sinks[f"{text}.ends"].write(ends.astype("<u8").tobytes())
        counts = _integers(columns, "caption_counts")
        if several:
            sinks["rows"].write((captions + np.cumsum(counts)).astype("<u8").tobytes())
        for name in written:
            numbers = columns[name] if name in columns else np.full(len(counts), np.nan)
            sinks[name].write(numbers.astype("<f8").tobytes())
    _write_lookup(parts, "key_hashes", sinks["keys.ends"].size // WORD, open_column("known_keys"))
    _write_lookup(parts, "caption_hashes", sinks["captions.ends"].size // WORD, open_column("known_captions"))


def _integers(columns: Columns, name: str) -> NDArray[np.int64]:
    return columns[name].astype(np.int64, copy=False)


def _write_lookup(parts: Parts, column: str, count: int, sink: Sink, slice_size: int = _LOOKUP_SLICE) -> None:
    """(hash, number of the first that has it), ascending, a slice of the hashes' range at a time."""
    slices = 1
    while count > slices * slice_size:
        slices *= 2
    for number in range(slices):
        hashes, numbers, start = [np.empty(0, np.uint64)], [np.empty(0, np.int64)], 0
        for columns in parts():
            found = columns[column].astype(np.uint64, copy=False)
            here = np.flatnonzero(leading_bits(found, slices) == number) if slices > 1 else np.arange(len(found))
            hashes.append(found[here])
            numbers.append(here + start)
            start += len(found)
        distinct, first = np.unique(np.concatenate(hashes), return_index=True)
        rows = np.concatenate(numbers)[first].astype(np.uint64)
        sink.write(np.stack([distinct, rows], axis=1).astype("<u8").tobytes())
