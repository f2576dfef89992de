"""Sources: whatever a user has, as raw records.

A source is cut into parts (an input tar; a run of `shard_size` files or rows). A part is small to describe,
is read by one worker process, becomes one image shard, and is what a restart repeats.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from pipeline.data import config as c
from pipeline.errors import UserError


@dataclass(frozen=True)
class Part:
    """A piece of a source. `items` is for the source alone; `fingerprint` changes when the piece does."""

    number: int
    fingerprint: str
    items: tuple[Any, ...]


@dataclass(frozen=True)
class Record:
    """A captioned picture as found: nothing of it has been decoded or checked."""

    key: str
    image: bytes | None
    caption: bytes | str | None
    extension: str = ""
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Unreadable:
    """Something that should have been a record and could not be read."""

    key: str
    reason: str
    detail: str


class Source(Protocol):
    def parts(self, size: int) -> Iterator[Part]:
        """The whole source in its fixed order, cut into parts of at most `size` records where it is not cut yet."""

    def records(self, part: Part) -> Iterator[Record | Unreadable]:
        """The records of one part, in their fixed order. Called in worker processes."""


def open_source(config: c.Source, image_size: int) -> Source:
    """The source that `config` describes; `image_size` is for sources that render.

    Raises:
        UserError: it is not there, or a package that it needs is not installed.
    """
    # Imported here: each source brings its own libraries.
    if isinstance(config, c.OpenMojiSource):
        from pipeline.data.sources.openmoji import OpenMoji

        return OpenMoji(config, image_size)
    if isinstance(config, c.FolderSource):
        from pipeline.data.sources.folder import Folder

        return Folder(config)
    if isinstance(config, c.TableSource):
        from pipeline.data.sources.table import Table

        return Table(config)
    if isinstance(config, c.WebDatasetSource):
        from pipeline.data.sources.webdataset import WebDataset

        return WebDataset(config)
    from pipeline.data.sources.huggingface import HuggingFace

    return HuggingFace(config)


def missing_package(package: str, extra: str, purpose: str) -> UserError:
    return UserError(f"{purpose} needs the package '{package}': pip install 'smalti[{extra}]'")
