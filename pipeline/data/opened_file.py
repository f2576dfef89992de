"""A file of a stage's directory that lies there, or in the object store that it was pushed to (`pushed.py`).

with mapped(directory, "train/000000.tar", size, sha256) as tar:
    tar[512:1024], len(tar)
"""

from __future__ import annotations

import io
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.core import elsewhere
from pipeline.data.remote_file import RemoteFile

Sliced = mmap.mmap | RemoteFile


class LocalFile:
    """An open file. Threads may share it."""

    def __init__(self, path: Path) -> None:
        self._file = io.FileIO(path)
        self.size = os.fstat(self._file.fileno()).st_size

    def read(self, begin: int, size: int) -> bytes:
        """Up to `size` bytes from `begin` on."""
        return os.pread(self._file.fileno(), size, begin)


def remote(directory: Path, name: str, size: int, content: str) -> RemoteFile | None:
    """The file `name` of a stage's directory in the store that it was pushed to; None: it lies here, or nowhere."""
    if (directory / name).exists():
        return None
    found = elsewhere.read(directory)
    return None if found is None else RemoteFile(found.url_of(name, content), size, content)


@contextmanager
def mapped(directory: Path, name: str, size: int, content: str) -> Iterator[Sliced]:
    """The same, to be sliced. Raises OSError or ValueError when it lies nowhere, or is empty."""
    if found := remote(directory, name, size, content):
        yield found
        return
    with open(directory / name, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as here:
        yield here
