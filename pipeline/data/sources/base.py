"""Sources: whatever a user has, as raw records.

A source is cut into parts (an input tar; a run of `shard_size` files or rows). A part is small to describe,
is read by one worker process, becomes one image shard, and is what a restart repeats.

What is wrong with one file is that record's fault, and it is rejected. What is wrong with the source (it went away,
the network failed, a file changed while it was read) stops the stage: nothing of that part is recorded, and a
restart reads it again.
"""

from __future__ import annotations

import errno
import posixpath
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from fsspec import AbstractFileSystem

from pipeline.core.errors import UserError

Stamp = list[object]  # size and version of a file: changes when the file is replaced

_OF_THIS_FILE_ALONE = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ValueError)


@dataclass(frozen=True)
class Part:
    """A piece of a source. `items` is for the source alone; `fingerprint` changes when the piece does."""

    number: int
    fingerprint: str
    items: tuple[Any, ...]


@dataclass(frozen=True)
class Record:
    """A captioned image as found: nothing of it has been decoded or checked."""

    key: str
    image: bytes | None
    caption: bytes | str | None
    extension: str = ""
    meta: Mapping[str, object] = field(default_factory=dict)
    group: str | None = None  # decides the split; None: the key does


@dataclass(frozen=True)
class Unreadable:
    """Something that should have been a record and could not be read."""

    key: str
    reason: str
    detail: str


class UnreadableFile(Exception):
    """One file cannot be read; the others may be fine."""


class Source(Protocol):
    """What a user has, as raw records in a fixed order."""

    @property
    def credit(self) -> str | None:
        """What a page that shows these images has to say about their origin; None: nothing is known."""

    def parts(self, size: int) -> Iterator[Part]:
        """The whole source in its fixed order, cut into parts of at most `size` records where it is not cut yet."""

    def records(self, part: Part) -> Iterator[Record | Unreadable]:
        """The records of one part, in their fixed order. Called in worker processes."""


def missing_package(package: str, extra: str, purpose: str) -> UserError:
    """The error of a source whose package is not installed; `extra` is the one of ours that brings it."""
    return UserError(f"{purpose} needs the package '{package}': pip install 'smalti[{extra}]'")


def read_file(files: AbstractFileSystem, path: str) -> bytes:
    """The content of a file of the source.

    Raises:
        UnreadableFile: it is not there, or not ours to read.
        UserError: the storage failed.
    """
    try:
        content: bytes = files.cat_file(path)
    except _OF_THIS_FILE_ALONE as error:
        raise UnreadableFile(str(error)) from error
    except Exception as error:  # each kind of storage has its own
        if isinstance(error, OSError) and error.errno in (errno.ELOOP, errno.ENAMETOOLONG):
            raise UnreadableFile(str(error)) from error
        raise interrupted(path, error) from error
    return content


def is_listed(files: AbstractFileSystem, path: str) -> bool:
    """Whether the folder of `path` still lists it: if so, this file is at fault, else the source."""
    files.invalidate_cache()
    try:
        return path in files.ls(posixpath.dirname(path), detail=False)
    except OSError:
        return False


def stamp(info: Mapping[str, object]) -> Stamp:
    """The stamp of a file, from fsspec's `info` about it, listed or asked for alone."""
    when = next((info[name] for name in ("ETag", "etag", "mtime", "LastModified", "last_modified") if name in info), "")
    return [info.get("size"), str(when)]


def interrupted(path: str, error: object) -> UserError:
    """The error of a source that failed at `path`: the stage stops, and a restart reads the part again."""
    return UserError(
        f"prepare: the source failed at {path}: {error}; finished shards are kept: see that it is there, and run the "
        "same command again"
    )


def changed(path: str) -> UserError:
    """The error of a source whose file is another one than when the part was described."""
    return UserError(
        f"prepare: {path} changed while it was being read; finished shards are kept: run the same command again"
    )


def group_of(value: object) -> str | None:
    """The group of a sample as text; a missing one leaves the sample alone in its own."""
    return None if value is None else str(value)
