"""The shards of a split as a table beside index.json, 60 bytes each, of which nothing is parsed when it is read.

prepare/train.shards    a `RECORD` a shard; behind them, where images stay in the users' tars, the tars' paths,
                        with null bytes between, compressed by zlib

entry = write_table(path, shards)           # for index.json
read_table(path, "train", entry)[3]         # a `ShardEntry`
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NotRequired, TypedDict, overload

import numpy as np
from numpy.typing import NDArray

from pipeline.core.atomic_io import write_atomic
from pipeline.core.errors import UserError

RECORD = np.dtype(
    [
        ("number", "<u4"),  # of the part of the source: its name; in the upper 8 bits, of the source
        ("samples", "<u4"),
        ("captions", "<u4"),
        ("bytes", "<u8"),
        ("tar_bytes", "<u8"),  # 0: the shard is a tar
        ("sha256", "V32"),
    ]
)


PARTS = 1 << 24  # of a source, at most


def part_name(source: int, number: int) -> str:
    """What the files of a part are called. Of a second source, so that none has to move when one before it grows."""
    return f"{source}-{number:06d}" if source else f"{number:06d}"


def _number(name: str) -> int:
    source, _, number = name.rpartition("-")
    return int(source or 0) * PARTS + int(number)


class ShardEntry(TypedDict):
    """An image shard of the index; `shards.Shard` is the same as an object."""

    name: str
    samples: int
    bytes: int
    sha256: str
    captions: NotRequired[int]  # of all samples; missing: one each
    # Where images stay in the user's tar: its path and bytes; `bytes` are then the images', `sha256` is the index's.
    tar: NotRequired[str]
    tar_bytes: NotRequired[int]


class TableEntry(TypedDict):
    """What index.json says of a table."""

    count: int
    sha256: str  # of the file


class ShardTable(Sequence[ShardEntry]):
    """The shards of a split. Each is made when it is asked for."""

    def __init__(self, split: str, records: NDArray[np.void], tars: Sequence[str]) -> None:
        self._split, self._records, self._tars = split, records, tars

    @property
    def samples(self) -> NDArray[np.int64]:
        """Of each shard."""
        return self._records["samples"].astype(np.int64)

    def __len__(self) -> int:
        return len(self._records)

    @overload
    def __getitem__(self, index: int) -> ShardEntry: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[ShardEntry]: ...
    def __getitem__(self, index: int | slice) -> ShardEntry | Sequence[ShardEntry]:
        if isinstance(index, slice):
            return ShardTable(self._split, self._records[index], self._tars[index])
        return self._entry(index)

    def __iter__(self) -> Iterator[ShardEntry]:
        return (self._entry(number) for number in range(len(self)))

    def _entry(self, index: int) -> ShardEntry:
        number, samples, captions, size, tar_bytes, sha256 = self._records[index].item()
        entry: ShardEntry = {
            "name": f"{self._split}/{part_name(*divmod(number, PARTS))}.tar",
            "samples": samples,
            "bytes": size,
            "sha256": sha256.hex(),
        }
        if captions != samples:
            entry["captions"] = captions
        if self._tars:
            entry |= {"tar": self._tars[index], "tar_bytes": tar_bytes}
        return entry


def write_table(path: Path, shards: Sequence[ShardEntry]) -> TableEntry:
    """Write the table of these shards."""
    records = np.zeros(len(shards), RECORD)
    records["number"] = [_number(Path(shard["name"]).stem) for shard in shards]
    records["samples"] = [shard["samples"] for shard in shards]
    records["captions"] = [shard.get("captions", shard["samples"]) for shard in shards]
    records["bytes"] = [shard["bytes"] for shard in shards]
    records["tar_bytes"] = [shard.get("tar_bytes", 0) for shard in shards]
    records["sha256"] = np.frombuffer(b"".join(bytes.fromhex(shard["sha256"]) for shard in shards), "V32")
    tars = [shard["tar"].encode(errors="surrogateescape") for shard in shards if "tar" in shard]
    content = records.tobytes() + (zlib.compress(b"\0".join(tars)) if tars else b"")
    write_atomic(path, content)
    return {"count": len(shards), "sha256": hashlib.sha256(content).hexdigest()}


def read_table(path: Path, split: str, entry: TableEntry) -> ShardTable:
    """The table that `write_table` wrote. Raises UserError when it is missing or another one."""
    content = path.read_bytes() if path.is_file() else b""
    if (found := hashlib.sha256(content).hexdigest()) != entry["sha256"]:
        raise UserError(
            f"{path} is missing or damaged: expected sha256 {entry['sha256'][:12]}, found {found[:12]}: run the stage "
            "prepare again"
        )
    end = entry["count"] * RECORD.itemsize
    tars = zlib.decompress(content[end:]).decode(errors="surrogateescape").split("\0") if content[end:] else []
    return ShardTable(split, np.frombuffer(content, RECORD, entry["count"]), tars)
