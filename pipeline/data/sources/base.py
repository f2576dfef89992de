"""Sources: whatever a user has, as raw records.

A source is cut into parts (an input tar; a run of `shard_size` files or rows). A part is small to describe,
is read by one worker process, becomes one image shard, and is what a restart repeats.

What is wrong with one file is that record's fault, and it is rejected. What is wrong with the source (it went away,
the network failed, a file changed while it was read) stops the stage: nothing of that part is recorded, and a
restart reads it again.

Nothing is lost without a count: each part ends with `Counted`, what the source itself says it holds, and `prepare`
compares that with what became of the records.
"""

from __future__ import annotations

import errno
import hashlib
import os
import posixpath
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from pipeline.core.credentials import url_to_fs
from pipeline.core.errors import StoppedOnRequest, UserError
from pipeline.core.text import visible
from pipeline.core.urls import mask

Stamp = list[object]  # size and version of a file: changes when the file is replaced

LARGEST_IMAGE = 256 << 20  # bytes of an encoded image; what is larger is not read
LARGEST_TEXT = 16 << 20  # bytes of a caption or its metadata
# Names that systems and editors leave behind. Whatever begins with a dot is one, too.
LEFTOVERS = frozenset({"__MACOSX", "Thumbs.db", "desktop.ini", "@eaDir", "#recycle", "$RECYCLE.BIN", "lost+found"})

# What the kinds of storage call that which changes with a file; the last is HTTP's, of servers without ETags.
_VERSIONS = ("ETag", "etag", "mtime", "LastModified", "last_modified", "Last-Modified")
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
    caption: object  # text, bytes, a number, or a list of them; anything else is rejected
    extension: str = ""
    meta: Mapping[str, object] = field(default_factory=dict)
    group: str | None = None  # decides the split; None: the key does
    where: str = ""  # e.g. "row 17": how to find it again when the key does not say
    offset: int = 0  # of the image in the part's tar, in bytes; 0: it lies in none


@dataclass(frozen=True)
class Unreadable:
    """Something that should have been a record and could not be read."""

    key: str
    reason: str
    detail: str
    samples: int = 1  # how many it holds
    rest: bool = False  # holds, besides, what this part lacks of what a part of this source holds


@dataclass(frozen=True)
class LeftOut:
    """Samples that are not meant to be read, by the rules of the source; counted, and no reason to fail."""

    reason: str
    samples: int = 1


@dataclass(frozen=True)
class Counted:
    """How many samples a part holds, counted apart from its records. Comes last."""

    samples: int


Item = Record | Unreadable | LeftOut | Counted


class UnreadableFile(Exception):
    """One file cannot be read; the others may be fine."""


class Source(Protocol):
    """What a user has, as raw records in a fixed order."""

    @property
    def credit(self) -> str | None:
        """What a page that shows these images has to say about their origin; None: nothing is known."""

    def parts(self, size: int) -> Iterator[Part]:
        """The whole source in its fixed order, cut into parts of at most `size` records where it is not cut yet."""

    def records(self, part: Part) -> Iterator[Item]:
        """The records of one part, in their fixed order, and last their count. Called in worker processes."""

    def left_out(self) -> Mapping[str, int]:
        """What belongs to no part, by reason: files that the source's rules leave out. Call `parts` first."""


def file_system(url: str) -> tuple[AbstractFileSystem, str]:
    """The file system of a path or URL of the config, with the password that was taken out of it; and the path there.

    Raises:
        UserError: nothing opens such a URL, or its package is not installed.
    """
    try:
        files, path = url_to_fs(url)
    except UserError:
        raise
    except Exception as error:  # each kind of storage has its own
        raise UserError(f"prepare.source: {visible(mask(url))} cannot be opened: {mask(fault(error))}") from error
    return files, path


def missing_package(package: str, extra: str, purpose: str) -> UserError:
    """The error of a source whose package is not installed; `extra` is the one of ours that brings it."""
    return UserError(f"{purpose} needs the package '{package}': pip install 'smalti[{extra}]'")


def guarded(key: str, make: Callable[[], Record | Unreadable]) -> Record | Unreadable:
    """What `make` returns; whatever it raises is that record's fault, and not the end of the stage.

    A source makes each record through this, so that no parser's or user's surprise stops the others.

    Raises:
        UserError, StoppedOnRequest, MemoryError: the source failed, or the machine.
    """
    try:
        return make()
    except (UserError, StoppedOnRequest, MemoryError):
        raise
    except Exception as error:
        return Unreadable(key, "unusable sample", fault(error))


def fault(error: BaseException) -> str:
    """What a surprise of a parser says, in a line of bounded length."""
    return visible(f"{type(error).__name__}: {' '.join(str(error)[:200].split())}")


def content_key(image: object, caption: object) -> str:
    """A key that the sample's own content gives: it stays when rows come and go around it."""
    content = image if isinstance(image, bytes) else repr(image).encode("utf-8", "surrogatepass")
    text = caption if isinstance(caption, bytes) else repr(caption).encode("utf-8", "surrogatepass")
    return hashlib.sha256(hashlib.sha256(content).digest() + text).hexdigest()[:20]


def is_leftover(path: str) -> bool:
    """Whether a path below the source's root is hidden, or what systems and editors leave behind."""
    return any(part.startswith(".") or part in LEFTOVERS for part in path.split("/") if part not in ("", ".", ".."))


def read_file(files: AbstractFileSystem, path: str, largest: int = LARGEST_IMAGE) -> bytes:
    """The content of a file of the source.

    Raises:
        UnreadableFile: it is not there, not ours to read, or larger than `largest` bytes.
        UserError: the storage failed.
    """
    try:
        content = _content(files, path, largest)
    except UnreadableFile:
        raise
    except _OF_THIS_FILE_ALONE as error:
        raise UnreadableFile(str(error)) from error
    except Exception as error:  # each kind of storage has its own
        if isinstance(error, OSError) and error.errno in (errno.ELOOP, errno.ENAMETOOLONG):
            raise UnreadableFile(str(error)) from error
        raise interrupted(path, error) from error
    return content


def _content(files: AbstractFileSystem, path: str, largest: int) -> bytes:
    content: bytes
    if isinstance(files, LocalFileSystem):
        about = os.stat(path)
        if not stat.S_ISREG(about.st_mode):  # to open a pipe is to wait for its other end
            raise UnreadableFile(f"{path} is no regular file")
        with files.open(path, "rb") as file:
            content = file.read(min(about.st_size, largest) + 1)  # as much memory is set aside as is asked for
    else:
        size = files.size(path)
        content = files.cat_file(path) if size is None or size <= largest else b""
        if size is not None and size > largest:
            raise UnreadableFile(f"{size} bytes, at most {largest} are read")
    if len(content) > largest:
        raise UnreadableFile(f"more than {largest} bytes, which is the most that is read")
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
    when = next((info[name] for name in _VERSIONS if name in info), "")
    return [info.get("size"), str(when)]


def interrupted(path: str, error: object) -> UserError:
    """The error of a source that failed at `path`: the stage stops, and a restart reads the part again."""
    what = visible(mask(f"{path}: {' '.join(str(error).split())}"))
    return UserError(
        f"prepare: the source failed at {what}; finished shards are kept: see that it is there, and run the same "
        "command again"
    )


def changed(path: str) -> UserError:
    """The error of a source whose file is another one than when the part was described."""
    return UserError(
        f"prepare: {visible(mask(path))} changed while it was being read; finished shards are kept: run the same "
        "command again"
    )


def group_of(value: object) -> str | None:
    """The group of a sample as text; a missing or blank one, as a CSV has it, leaves the sample alone in its own."""
    return None if value is None or value == "" else str(value)
