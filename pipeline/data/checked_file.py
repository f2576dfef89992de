"""Files of which any range can be read and checked by itself: each block of 16 KiB has a checksum.

writer = CheckedWriter(path)
writer.write(content)
checksums = writer.close()                                # uint32 [blocks], CRC-32
CheckedFile(path, size, checksums).read(begin, 100)       # reads the blocks around these 100 bytes, no more
"""

from __future__ import annotations

import io
import os
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.core.errors import UserError

BLOCK_BYTES = 1 << 14
_CACHED_BLOCKS = 1_024  # of each file: 16 MB


class Ranges(Protocol):
    """Bytes of which ranges can be read, in a file or in memory."""

    @property
    def size(self) -> int:
        """How many bytes there are."""

    def read(self, begin: int, size: int, /) -> bytes:
        """`size` bytes from `begin` on."""


class MemoryFile:
    """What a `CheckedWriter` writes and a `CheckedFile` reads, in memory and without checksums."""

    def __init__(self) -> None:
        self._content = bytearray()

    @property
    def size(self) -> int:
        """How many bytes there are."""
        return len(self._content)

    def write(self, content: bytes) -> None:
        """Append."""
        self._content += content

    def read(self, begin: int, size: int) -> bytes:
        """`size` bytes from `begin` on."""
        return bytes(self._content[begin : begin + size])


class CheckedWriter:
    """A file that is written front to back, and the checksums of its blocks."""

    def __init__(self, path: Path) -> None:
        self.path, self.size = path, 0
        path.unlink(missing_ok=True)  # never changed: a run that branched off may share it
        self._file = io.BufferedWriter(io.FileIO(path, "xb"))
        self._checksums: list[int] = []
        self._open = 0  # the checksum of the block that is not full yet

    def write(self, content: bytes) -> None:
        """Append."""
        self._file.write(content)
        view = memoryview(content)
        while view:
            room = BLOCK_BYTES - self.size % BLOCK_BYTES
            piece, view = view[:room], view[room:]
            self._open = zlib.crc32(piece, self._open)
            self.size += len(piece)
            if not self.size % BLOCK_BYTES:
                self._checksums.append(self._open)
                self._open = 0

    def close(self) -> NDArray[np.uint32]:
        """Close the file; the checksums of its blocks, uint32 [blocks]."""
        self._file.close()
        if self.size % BLOCK_BYTES:
            self._checksums.append(self._open)
            self._open = 0
        return np.array(self._checksums, dtype=np.uint32)


class CheckedFile:
    """A file that a `CheckedWriter` wrote. Threads may share it."""

    def __init__(self, path: Path, size: int, checksums: NDArray[np.uint32]) -> None:
        """Raises UserError when the file is missing or of another size."""
        self.path, self._size = path, size
        self._checksums = checksums
        try:
            self._file = io.FileIO(path)
        except OSError as error:
            raise UserError(f"{path} is missing or damaged: {error}: run the stage prepare again") from error
        if (found := os.fstat(self._file.fileno()).st_size) != size:
            raise UserError(f"{path} is damaged: expected {size} bytes, found {found}: run the stage prepare again")
        self._block = lru_cache(_CACHED_BLOCKS)(self._read_block)

    @property
    def size(self) -> int:
        """How many bytes there are."""
        return self._size

    def read(self, begin: int, size: int) -> bytes:
        """`size` bytes from `begin` on, all within the file. Raises UserError when they are not as written."""
        if not size:
            return b""
        first, last = begin // BLOCK_BYTES, (begin + size - 1) // BLOCK_BYTES
        start = begin - first * BLOCK_BYTES
        if first == last:
            return self._block(first)[start : start + size]
        return b"".join(self._block(number) for number in range(first, last + 1))[start : start + size]

    def verify(self) -> None:
        """Read the whole file. Raises UserError when a byte of it is not as written."""
        for number in range(len(self._checksums)):
            self._read_block(number)

    def _read_block(self, number: int) -> bytes:
        begin = number * BLOCK_BYTES
        content = os.pread(self._file.fileno(), BLOCK_BYTES, begin)
        if zlib.crc32(content) != self._checksums[number]:
            raise UserError(
                f"{self.path} is damaged between bytes {begin} and {begin + BLOCK_BYTES}: wrong checksum; run the "
                "stage prepare again"
            )
        return content
