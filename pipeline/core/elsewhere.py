"""Large files of a finished stage that lie in an object store: store.json in the stage's directory.

write(directory, Elsewhere("s3://bucket/x/prepare", ".tar", {"train": {"files": 10, "bytes": 380_000_000}}))
read(directory).url_of("train/000000.tar", sha256)     # s3://bucket/x/prepare/train/000000.0123456789abcdef.tar

A local file is read where there is one; one that was deleted is read from there. An object has the hash of its content
in its name, so that what another config makes later never takes its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import TypedDict

from pipeline.core.atomic_io import read_json, write_json

_NAME = "store.json"
_HASH_DIGITS = 16


class FilesElsewhere(TypedDict):
    """The files of a folder that lie in the store."""

    files: int
    bytes: int


@dataclass(frozen=True)
class Elsewhere:
    """Where the files of a stage's folders that end in `suffix` lie."""

    url: str
    suffix: str
    folders: Mapping[str, FilesElsewhere]

    def url_of(self, name: str, content: str) -> str:
        """The object of a file; `content`: the hash of what it holds."""
        return f"{self.url}/{object_name(name, content)}"


def object_name(name: str, content: str) -> str:
    """What an object is called below the stage's URL."""
    path = PurePosixPath(name)
    return str(path.with_name(f"{path.stem}.{content[:_HASH_DIGITS]}{path.suffix}"))


def read(directory: Path) -> Elsewhere | None:
    """What lies in a store of this stage; None: nothing does."""
    path = directory / _NAME
    return Elsewhere(**read_json(path)) if path.is_file() else None


def write(directory: Path, elsewhere: Elsewhere) -> None:
    """Record what lies in a store: all files of these folders with this suffix."""
    write_json(directory / _NAME, asdict(elsewhere))
