"""The members of an uncompressed tar and where their bytes lie, also of tars that were joined with `cat`."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pipeline.core.errors import UserError

_BLOCK = 512


@dataclass(frozen=True)
class TarMember:
    """A file in a tar; of a link or a device, `is_file` is False."""

    name: str  # without ./ at its front
    offset: int  # of its content, in bytes
    size: int
    is_file: bool


def tar_members(path: Path) -> Iterator[TarMember]:
    """Every member in the tar's order, folders aside, those behind an end mark included.

    Raises:
        UserError: it is no uncompressed tar, is damaged, cut, or ends in something else.
    """
    try:
        with open(path, "rb") as file:
            begin: int | None = 0
            while begin is not None:
                file.seek(begin)
                with tarfile.TarFile(fileobj=file) as tar:
                    for member in tar:
                        if tar.offset <= member.offset:
                            raise tarfile.ReadError(f"the header at byte {member.offset:,} leads back")
                        if not member.isdir():
                            name = member.name.removeprefix("./")
                            yield TarMember(name, member.offset_data, member.size, member.isreg())
                    end = tar.offset
                if begin and end == begin:  # at a damaged header behind its first, tarfile ends as if the tar did
                    raise tarfile.ReadError(f"{path.stat().st_size - begin:,} bytes at byte {begin:,} are no tar")
                begin = _next_tar(file, end)
                if begin is None and file.tell() == end:
                    raise tarfile.ReadError(f"no end mark at byte {end:,}, as if it were cut")
    except Exception as error:  # tarfile raises some ten kinds at damaged headers
        raise UserError(
            f"{path}: expected an uncompressed tar of images, found something else or a damaged one ({error});"
            " write it again"
        ) from error


def _next_tar(file: BinaryIO, offset: int) -> int | None:
    """Where the next block that is not all zeros begins; None: there is none."""
    file.seek(offset)
    while block := file.read(_BLOCK):
        if any(block):
            return offset
        offset += len(block)
    return None
