"""An image shard as random access to its images, by the index beside it; its tar may lie in an object store."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

from pipeline.core.errors import UserError
from pipeline.core.manifest import first_fault
from pipeline.data import stored_image
from pipeline.data.opened_file import LocalFile, remote
from pipeline.data.remote_file import RemoteFile, is_remote
from pipeline.data.shards import Shard, index_path
from pipeline.data.stored_image import Cut

_NPY_1_0 = b"\x93NUMPY\x01\x00"
_NPY_HEADER = struct.Struct("<8sH")  # magic and version, bytes of the description that follows
_INDEX_ROW = struct.Struct("<3q")  # first byte, bytes, CRC-32: a row of .index.npy
_PLACE = struct.Struct("<8q")  # the same, the cut, and CRC-32 of key and captions: where images stay in their tars


class ShardFile:
    """An open shard. Threads may share it.

    Attributes:
        path: of its tar, or the URL.
        remote: its tar, where that lies in an object store.
    """

    def __init__(self, prepare_dir: Path, shard: Shard) -> None:
        """Raises UserError when the tar or its index is missing or of another size than recorded."""
        self.path, self._row = shard.path(prepare_dir), _INDEX_ROW if shard.tar is None else _PLACE
        expected = shard.bytes if shard.tar_bytes is None else shard.tar_bytes
        self.remote = tar_elsewhere(prepare_dir, shard)
        try:
            self._file = self.remote or LocalFile(Path(self.path))
            self._index = io.FileIO(index_path(prepare_dir / shard.name))
        except OSError as error:
            raise UserError(f"{self.path} is missing or damaged: {error}: run the stage prepare again") from error
        # Not by np.load: a resume opens as many shards as there are streams, and this is a tenth of the time.
        header = self._index.read(_NPY_HEADER.size)
        kind, length = _NPY_HEADER.unpack(header) if len(header) == _NPY_HEADER.size else (b"", 0)
        self._begin = _NPY_HEADER.size + length
        rows = (os.fstat(self._index.fileno()).st_size - self._begin) / self._row.size if kind == _NPY_1_0 else 0
        if self._file.size != expected or rows != shard.samples:
            raise UserError(
                f"{self.path} is another file than prepare {'wrote' if shard.tar is None else 'read'}: expected "
                f"{expected} bytes and {shard.samples} samples, found {self._file.size} and {rows:g}: run the stage "
                "prepare again"
            )

    def place(self, row: int) -> tuple[int, int, int]:
        """First byte, bytes and CRC-32 of the image of sample `row`."""
        begin, size, checksum = self._entry(row)[:3]
        return begin, size, checksum

    def cut(self, row: int) -> Cut | None:
        """What is kept of the image of sample `row`; None: all of it, as it is stored."""
        return None if self._row is _INDEX_ROW else Cut(*self._entry(row)[3:7])

    def read(self, row: int) -> bytes:
        """The bytes of the image of sample `row`. Raises UserError when they are not those that prepare wrote."""
        begin, size, checksum = self.place(row)
        is_within = begin >= 0 and 0 <= size < 1 << 31 and begin + size <= self._file.size
        content = self._file.read(begin, size) if is_within else b""
        if zlib.crc32(content) != checksum and self.remote is not None and is_within:
            self.remote.forget(begin, size)  # damaged in the cache, perhaps
            content = self.remote.read_directly(begin, size)
        if zlib.crc32(content) != checksum:
            raise UserError(f"{self.path} is damaged at sample {row}: wrong checksum; run the stage prepare again")
        return content

    def pixels(self, row: int) -> stored_image.Pixels:
        """uint8 [3, H, W] of sample `row`. Raises UserError when it is not what prepare wrote."""
        content = self.read(row)
        try:
            return stored_image.decode(content, self.cut(row))
        except (OSError, ValueError, SyntaxError, zlib.error) as error:
            raise UserError(f"{self.path} is damaged at sample {row}: {error}; run the stage prepare again") from error

    def _entry(self, row: int) -> tuple[int, ...]:
        return self._row.unpack(os.pread(self._index.fileno(), self._row.size, self._begin + row * self._row.size))


def tar_elsewhere(prepare_dir: Path, shard: Shard) -> RemoteFile | None:
    """The tar of a shard, where it lies in an object store."""
    if shard.tar is None:
        return remote(prepare_dir, shard.name, shard.bytes, shard.sha256)
    if not is_remote(shard.tar):
        return None
    assert shard.tar_bytes is not None
    # Its own content is not known; that of the index, with a checksum of each image that counts, is.
    return RemoteFile(shard.tar, shard.tar_bytes, shard.sha256)


def check_shard(prepare_dir: Path, shard: Shard) -> None:
    """Raises UserError when the tar is not, byte for byte, the one that prepare wrote.

    Where the images stay in the user's tar, its size and the index are compared: who reads an image compares its own
    checksum.
    """
    if shard.tar is not None:
        ShardFile(prepare_dir, shard)
    elif (found := tar_elsewhere(prepare_dir, shard)) is not None:
        if (sha256 := found.sha256()) != shard.sha256:
            raise UserError(
                f"{found.url} is not the shard that prepare wrote: expected sha256 {shard.sha256[:12]}, found "
                f"{sha256[:12]}: remove it and run the stage prepare again"
            )
        return
    name = shard.name if shard.tar is None else index_path(Path(shard.name)).as_posix()
    fault = first_fault(prepare_dir, {name: {"sha256": shard.sha256}})
    if fault:
        raise UserError(
            f"{fault.path} is not the {'shard' if shard.tar is None else 'index'} that prepare wrote: expected "
            f"{fault.expected}, found {fault.found}: run the stage prepare again"
        )
