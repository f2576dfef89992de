"""Images that stay in the user's tar (`prepare.storage: in-place`): where they lie is written, and what is kept.

The tar may lie in an object store.

The index beside a shard's name, `train/000000.index.npy`, is int64 [samples, 8]: first byte, number of bytes and CRC-32
of each image in the tar, the cut (`stored_image.Cut`: left, top, sides, size), and a CRC-32 of key and captions.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.core.atomic_io import atomic_path, sha256_file
from pipeline.core.errors import UserError
from pipeline.data.remote_file import RemoteFile, is_remote
from pipeline.data.shards import Sample, index_path


@dataclass(frozen=True)
class UsersTar:
    """A tar whose images stay in it."""

    url: str  # or path
    bytes: int


class PlaceWriter:
    """The index of images that stay in the user's tar, sample by sample; `open_places` makes one."""

    bytes: int  # of the images; once it is closed
    sha256: str

    def __init__(self, tar: UsersTar) -> None:
        self.tar = tar
        self.rows: list[tuple[int, ...]] = []

    def add(self, sample: Sample) -> None:
        """Append a sample."""
        assert sample.cut is not None
        texts = zlib.crc32(json.dumps([sample.key, *sample.captions]).encode())
        self.rows.append((sample.offset, len(sample.encoded), zlib.crc32(sample.encoded), *sample.cut, texts))


@contextmanager
def open_places(path: Path, tar: UsersTar) -> Iterator[PlaceWriter]:
    """A writer of the index of a shard `path` whose images stay in `tar`; it is there when the block ended well.

    Raises:
        UserError: the images do not lie in `tar` as they are: it is compressed.
    """
    writer = PlaceWriter(tar)
    yield writer
    for begin, checksum, content in _found_there(tar, writer.rows):
        if begin == 0 or zlib.crc32(content) != checksum:
            raise UserError(
                f"prepare.storage: in-place expects images that lie in their tar as they are, found others in {tar.url}"
                ": unpack it if it is compressed, or set storage to png, webp or jpeg"
            )
    with atomic_path(index_path(path)) as temporary, open(temporary, "wb") as index:
        np.save(index, np.array(writer.rows, dtype=np.int64).reshape(-1, 8))
    writer.bytes, writer.sha256 = sum(row[1] for row in writer.rows), sha256_file(index_path(path))


def _found_there(tar: UsersTar, rows: list[tuple[int, ...]]) -> Iterator[tuple[int, int, bytes]]:
    """(first byte, checksum, content there) of each image; of a tar in a store of the first and last alone.

    Those tell whether offsets are those of the tar, and a second reading of all would cost as much as the first.
    """
    if is_remote(tar.url):
        there = RemoteFile(tar.url, tar.bytes, "")
        for begin, size, checksum, *_ in {rows[0], rows[-1]} if rows else ():
            is_within = begin + size <= tar.bytes
            yield begin, checksum, there.read_directly(begin, size) if is_within else b""
        return
    with open(tar.url, "rb") as file:
        for begin, size, checksum, *_ in rows:
            yield begin, checksum, os.pread(file.fileno(), size, begin)
