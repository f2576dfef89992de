"""The files of token arrays: blocks of many image shards end to end, each written by one task, block by block.

    for part in token_parts(prepare_dir, [...]): ...
    writer = PartWriter(directory, part, shape, made_from)
    writer.is_finished(number)              # the block of the part's shard `number` is there, and as recorded
    writer.write(number, content)           # the blocks before it are there

    tokenize/train/000.tokens               blocks (`token_blocks.py`), none of which is ever moved
    tokenize/train/000.journal              for each, its record, a hash of what it was made from, and a CRC-32

Which shards a part has is a function of their number alone, so the files are the same whatever tasks made them. A block
is written at its place, then its record: one that is on its way when a task is killed has no record, and is written
again. Two tasks that write one part write the same bytes to the same places. A file that runs share is copied first.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.core.atomic_io import atomic_path, fsync_directory, is_full, no_space
from pipeline.core.errors import UserError
from pipeline.data.remote_file import RemoteFile
from pipeline.data.shards import Shard, Shards, read_index
from pipeline.data.splits import SPLITS
from pipeline.data.token_blocks import RECORD, Content, Records, Shape, pack

PARTS = 512  # files of a split, at most: more than tasks, and few enough to be mapped all at once
_ENTRY = np.dtype([("record", RECORD), ("made_from", "V32"), ("crc", "<u4")])


@dataclass(frozen=True)
class Part:
    """Image shards of a split whose token arrays lie in one file."""

    split: str
    number: int
    shards: Sequence[Shard]

    @property
    def name(self) -> str:
        """The file of its blocks, relative to the stage's directory."""
        return part_name(self.split, self.number)


def part_name(split: str, number: int) -> str:
    """The file of a part's blocks."""
    return f"{split}/{number:03d}.tokens"


def token_parts(prepare_dir: Path, splits: Sequence[str] = SPLITS) -> list[Part]:
    """The parts of all that is to be tokenized, in a fixed order: `PARTS` of each split, or one a shard."""
    index, parts = read_index(prepare_dir)["splits"], []
    for split in splits:
        shards = Shards(index[split]["shards"])
        count = min(len(shards), PARTS)
        for number in range(count):
            own = shards[number * len(shards) // count : (number + 1) * len(shards) // count]
            parts.append(Part(split, number, own))
    return parts


class PartWriter:
    """Writes the blocks of a part, one after the other, and knows which of an earlier life are there."""

    def __init__(self, directory: Path, part: Part, shape: Shape, made_from: Sequence[str]) -> None:
        """`made_from`: of each shard, the hash of all that decides its arrays, in hexadecimal."""
        self.part, self.path, self._shape = part, directory / part.name, shape
        self._made_from = [bytes.fromhex(one) for one in made_from]

    @cached_property
    def records(self) -> Records:
        """The records of the first blocks, those that were made from what they are to be made from."""
        entries, end = read_journal(self.path), 0
        for number, entry in enumerate(entries[: len(self._made_from)]):
            record = entry["record"]
            made = entry["made_from"].tobytes() == self._made_from[number]
            if not made or record["begin"] != end or record["samples"] != self.part.shards[number].samples:
                return entries["record"][:number].copy()
            end += int(record["bytes"])
        return entries["record"][: len(self._made_from)].copy()

    def is_finished(self, number: int) -> bool:
        """Is the block of shard `number` there, and as recorded? Reads it."""
        return number < len(self.records) and damage(self.path, self.records[number : number + 1]) is None

    def write(self, number: int, content: Content) -> None:
        """Write the block of shard `number` and then its record; the blocks before it have theirs.

        Raises:
            UserError: a code is out of range, or the disk is full.
        """
        shard = self.part.shards[number]
        block, record = pack(content, self._shape, shard.stem)
        begin = int(self.records[number - 1]["begin"] + self.records[number - 1]["bytes"]) if number else 0
        record["begin"], record["part"] = begin, self.part.number
        record["sha256"] = np.void(hashlib.sha256(block).digest())
        again = number < len(self.records)
        if again and self.records[number]["bytes"] != len(block):
            raise UserError(
                f"{self.path}: expected {self.records[number]['bytes']} bytes of {shard.name}, found {len(block)}: "
                "remove this file and run the stage tokenize again"
            )
        entry = np.zeros(1, _ENTRY)
        entry["record"], entry["made_from"] = record, np.void(self._made_from[number])
        entry["crc"] = zlib.crc32(entry.tobytes()[:-4])
        with _written(self.path):
            is_last = number + 1 == len(self.part.shards)
            _write_at(self.path, begin, block, is_last)
            _write_at(_journal(self.path), number * _ENTRY.itemsize, entry.tobytes(), is_last)
            if not number:
                fsync_directory(self.path.parent)
        self.records = np.concatenate([self.records[:number], record, self.records[number + 1 :]])

    def check(self) -> Records:
        """The records of all blocks; only sizes are looked at. Raises UserError when one is not there."""
        if len(self.records) < len(self.part.shards):
            shard = self.part.shards[len(self.records)]
            raise UserError(f"{self.path}: expected the tokens of {shard.name}, found none of it: run tokenize again")
        check_size(self.path, int(self.records[-1]["begin"] + self.records[-1]["bytes"]))
        return self.records


def remove_others(directory: Path, parts: Sequence[Part]) -> None:
    """Remove what else lies beside the files of these parts: those of an earlier version, or of more shards."""
    wanted = {directory / part.name for part in parts}
    for split in SPLITS:
        for path in sorted((directory / split).glob("*")):
            if path.with_suffix(".tokens") not in wanted or path.suffix not in (".tokens", ".journal"):
                path.unlink()


def read_journal(path: Path) -> NDArray[np.void]:
    """The entries of a part's journal, up to the first that is not whole."""
    journal = _journal(path)
    content = journal.read_bytes() if journal.is_file() else b""
    entries = np.frombuffer(content, _ENTRY, len(content) // _ENTRY.itemsize)
    for number, entry in enumerate(entries):
        if zlib.crc32(entry.tobytes()[:-4]) != entry["crc"]:
            return entries[:number]
    return entries


def damage(path: Path, records: Records) -> str | None:
    """What is wrong with these blocks of a file, which are read; None: they are as recorded."""
    try:
        with open(path, "rb", buffering=0) as file:
            for record in records:
                begin, size = int(record["begin"]), int(record["bytes"])
                found = hashlib.sha256(os.pread(file.fileno(), size, begin)).digest()
                if found != record["sha256"].tobytes():
                    expected = record["sha256"].tobytes().hex()
                    return (
                        f"{path} is damaged between bytes {begin} and {begin + size}: expected sha256 "
                        f"{expected[:12]}, found {found.hex()[:12]}"
                    )
    except OSError as error:
        return f"{path} is missing or damaged: {error}"
    return None


def part_file(split: str, records: Records) -> tuple[str, int, str]:
    """Name, bytes and hash of the file of a part, of which these are the records."""
    hashes = b"".join(record["sha256"].tobytes() for record in records)
    last = records[-1]
    return part_name(split, int(last["part"])), int(last["begin"] + last["bytes"]), hashlib.sha256(hashes).hexdigest()


def damage_elsewhere(file: RemoteFile, record: np.void) -> str | None:
    """What is wrong with this block of a file in an object store, which is read; None: it is as recorded."""
    begin, size, expected = int(record["begin"]), int(record["bytes"]), record["sha256"].tobytes().hex()
    found = file.sha256(begin, size)
    if found != expected:  # in the cache, perhaps
        file.forget(begin, size)
        found = file.sha256(begin, size)
    if found == expected:
        return None
    return (
        f"{file.url} is damaged between bytes {begin} and {begin + size}: expected sha256 {expected[:12]}, found "
        f"{found[:12]}"
    )


def check_size(path: Path, size: int) -> None:
    """Raises UserError when a file is missing or of another size."""
    found = f"{path.stat().st_size} bytes" if path.is_file() else "no file"
    if found != f"{size} bytes":
        raise UserError(
            f"{path} is damaged: expected {size} bytes, found {found}: remove it and run the stage tokenize again"
        )


def _journal(path: Path) -> Path:
    return path.with_suffix(".journal")


def _write_at(path: Path, begin: int, content: bytes | bytearray, is_last: bool) -> None:
    """Write a range of a file and wait for the disk; behind the last one it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _take_a_copy(path)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        view = memoryview(content)
        while view:
            written = os.pwrite(descriptor, view, begin)
            begin, view = begin + written, view[written:]
        if is_last:
            os.ftruncate(descriptor, begin)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _take_a_copy(path: Path) -> None:
    """Where a run that branched off shares the file (as a hard link), what is written goes to a copy of it."""
    if path.is_file() and path.stat().st_nlink > 1:
        with atomic_path(path) as temporary:
            shutil.copyfile(path, temporary)


@contextmanager
def _written(path: Path) -> Iterator[None]:
    """Raises UserError where the disk is full."""
    try:
        yield
    except OSError as error:
        if is_full(path.parent, error):
            raise no_space(path) from error
        raise
