"""The files of a tar: read front to back from any stream, plain or compressed, or located on the disk.

Python's `tarfile` parses the headers. What is here is what it leaves open, and with it `webdataset`, which reads by it:
it ends without a word at a damaged header and at the first end mark of several tars one behind the other, and reads
members of any size.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol, cast

from pipeline.core.errors import UserError
from pipeline.data.sources.base import fault, interrupted

_BLOCK = 512
_KEPT = 2 * _BLOCK  # bytes that can be read again: `tarfile` steps back by one, we by a block
_CHUNK = 1 << 20
_LARGEST_HEADER = 1 << 20  # bytes of a long name or of extended headers; more is an attack on the memory


@dataclass(frozen=True)
class Member:
    """A file of a tar. `content` is None where it was not wanted, or where `problem` says why it could not be read."""

    name: str
    content: bytes | None
    problem: str = ""
    offset: int = 0  # of its content in the (uncompressed) tar, in bytes; 0: it lies there in pieces
    size: int = 0


class DamagedTar(Exception):
    """What comes next in a stream is no tar, or no longer one."""


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


class _File(_Readable, Protocol):
    def tell(self) -> int: ...
    def seek(self, position: int, /) -> int: ...


def read_members(stream: BinaryIO, url: str, largest: Callable[[str], int]) -> Iterator[Member]:
    """The regular files and links of all tars in `stream`, in their order.

    Args:
        stream: read forwards only, once.
        url: names it in errors.
        largest: of a member's name, how many bytes of it may be read; 0: it is not wanted.

    Raises:
        DamagedTar: after what could be read.
        UserError: the stream failed.
    """
    with _told():
        yield from _members(_Forward(_decompressed(_Source(stream, url))), largest)


def locate_members(path: Path) -> Iterator[Member]:
    """The regular files and links of all tars in an uncompressed file of this disk, in their order; none is read.

    Raises:
        DamagedTar: after what could be found.
    """
    with _told(), open(path, "rb") as file:
        yield from _members(file, lambda _: 0)


@contextmanager
def _told() -> Iterator[None]:
    """Whatever `tarfile` and the decompressors raise as DamagedTar."""
    try:
        yield
    except (DamagedTar, UserError, GeneratorExit):
        raise
    except Exception as error:  # some ten kinds
        raise DamagedTar(fault(error)) from error


def _members(forward: _File, largest: Callable[[str], int]) -> Iterator[Member]:
    tars = 0
    while True:
        zeros, more = _skip_zeros(forward)
        if tars and not zeros:
            at = forward.tell()
            raise DamagedTar(
                f"no member at byte {at}: what lies behind it is not read"
                if more
                else f"ends at byte {at} without an end mark, as if it were cut"
            )
        if not more:
            if not zeros:
                raise DamagedTar("empty file")
            return
        tars += 1
        yield from _one_tar(forward, largest)


def _one_tar(forward: _File, largest: Callable[[str], int]) -> Iterator[Member]:
    """The members up to the end mark, or to whatever is no header; leaves `forward` there."""
    tar = tarfile.TarFile(fileobj=cast(BinaryIO, forward), tarinfo=_Header)
    while (header := tar.next()) is not None:
        tar.members = []  # type: ignore[attr-defined]  # millions of headers would take memory
        if tar.offset <= header.offset:
            raise DamagedTar(f"the header at byte {header.offset} leads back")
        limit = largest(header.name)
        if header.islnk() or header.issym():
            yield Member(header.name, None, f"a link to {header.linkname}")
        elif header.isdir():
            continue
        elif not header.isreg():
            yield Member(header.name, None, "no regular file")
        elif not limit:
            problem = "a sparse file" if header.sparse is not None else ""
            yield Member(header.name, None, problem, header.offset_data, header.size)
        elif header.size > limit:
            yield Member(header.name, None, f"{header.size} bytes, at most {limit} are read")
        else:
            offset = 0 if header.sparse is not None else header.offset_data
            yield Member(header.name, _content(tar, header, forward), "", offset, header.size)
    forward.seek(tar.offset)


def _content(tar: tarfile.TarFile, header: tarfile.TarInfo, forward: _File) -> bytes:
    """The bytes of a regular file."""
    if header.sparse is not None:
        file = tar.extractfile(header)
        return file.read() if file is not None else b""
    forward.seek(header.offset_data)
    content = forward.read(header.size)
    if len(content) < header.size:
        raise DamagedTar(f"ends within {header.name}, at byte {forward.tell()}")
    return content


class _Header(tarfile.TarInfo):
    """A header whose extensions are of a bounded size."""

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        extension = self.type not in tarfile.SUPPORTED_TYPES or self.type in (
            tarfile.GNUTYPE_LONGNAME,
            tarfile.GNUTYPE_LONGLINK,
            tarfile.XHDTYPE,
            tarfile.XGLTYPE,
            tarfile.SOLARIS_XHDTYPE,
        )
        if self.size < 0 or (extension and self.size > _LARGEST_HEADER):
            raise DamagedTar(f"a header of {self.size} bytes")
        member: tarfile.TarInfo = super()._proc_member(tar)  # type: ignore[misc]
        return member


def _skip_zeros(forward: _File) -> tuple[int, bool]:
    """Read over blocks of zeros; returns how many there were, and whether something comes behind them."""
    zeros = 0
    while block := forward.read(_BLOCK):
        if any(block):
            forward.seek(forward.tell() - len(block))
            return zeros, True
        zeros += 1
    return zeros, False


def _decompressed(source: _Source) -> _Readable:
    """The stream itself, or what its first bytes say it is a compression of."""
    source.ahead = head = source.read(6)
    if head.startswith(b"\x1f\x8b"):
        return gzip.GzipFile(fileobj=cast(BinaryIO, source))
    if head.startswith(b"BZh"):
        return bz2.BZ2File(cast(BinaryIO, source))
    if head.startswith(b"\xfd7zXZ\x00"):
        return lzma.LZMAFile(cast(BinaryIO, source))
    return source


class _Source:
    """The stream of a source: when it fails, the source has failed, and not the tar."""

    def __init__(self, stream: BinaryIO, url: str) -> None:
        self.ahead = b""  # read already
        self._stream, self._url = stream, url

    def read(self, size: int = -1) -> bytes:
        """At most so many bytes."""
        if self.ahead:
            content, self.ahead = self.ahead[:size], self.ahead[size:]
            return content
        try:
            return self._stream.read(size)
        except Exception as error:
            raise interrupted(self._url, error) from error

    def seek(self, position: int, whence: int = 0) -> int:
        """Not possible; the decompressors want to see it."""
        raise OSError("read forwards only")


class _Forward:
    """A stream that is read once, forwards, and of which the last bytes can be read again."""

    def __init__(self, raw: _Readable) -> None:
        self._raw = raw
        self._position = 0
        self._behind = b""
        self._ahead = b""

    def tell(self) -> int:
        """The position in bytes."""
        return self._position

    def read(self, size: int) -> bytes:
        """So many bytes, or those that there are."""
        if self._ahead:
            pieces, self._ahead = [self._ahead[:size]], self._ahead[size:]
        else:
            pieces = [self._raw.read(min(size, _CHUNK))]
        missing = size - len(pieces[0]) if pieces[0] else 0
        while missing > 0 and (piece := self._raw.read(min(missing, _CHUNK))):
            pieces.append(piece)
            missing -= len(piece)
        content = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        self._position += len(content)
        self._behind = content[-_KEPT:] if len(content) >= _KEPT else (self._behind + content)[-_KEPT:]
        return content

    def seek(self, position: int) -> int:
        """Go there: forwards by reading, or a little back."""
        back = self._position - position
        if back > len(self._behind):
            raise DamagedTar(f"a header leads back to byte {position}")
        if back > 0:
            self._ahead = self._behind[-back:] + self._ahead
            self._behind = self._behind[:-back]
            self._position = position
        while self._position < position and self.read(min(position - self._position, _CHUNK)):
            pass
        return self._position
