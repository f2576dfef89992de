"""Which files of a tar are one sample.

As WebDataset has it, names that agree up to the first dot of their last part are one group: `a/007.jpg`, `a/007.txt`.
A group that holds several images is told apart by what stands before the last dot (`shot_v1.000.png`,
`shot_v1.000.txt`), where each image has a caption of its own; an image beside one that has (`007.depth.png`) is no
sample. What cannot be told apart is an error that weighs what it holds.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from pipeline.data.sources.base import is_leftover
from pipeline.data.sources.tar_members import Member

IMAGES = ("png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff")  # the first of these is a sample's image
_TOLD = ("text", "json", "class")  # kinds of files that say what an image shows
_KINDS = {"txt": "text", "json": "json", "cls": "class"}
_LARGEST_GROUP = 1 << 30  # bytes of one group; beyond it, its files are taken for samples of their own


@dataclass(frozen=True)
class File:
    """A file of a tar, and what its name says."""

    name: str
    prefix: str  # up to the first dot of the last part
    stem: str  # up to the last dot
    extension: str  # lower case, without the dot
    kind: str  # image, text, json, class or other
    hidden: bool
    content: bytes | None
    problem: str
    offset: int  # of the content in the tar

    @staticmethod
    def of(member: Member) -> File:
        """The file that `member` is."""
        folder, base = posixpath.split(member.name)
        stem, extension = posixpath.splitext(base)
        extension = extension[1:].lower()
        kind = "image" if extension in IMAGES else _KINDS.get(extension, "other")
        prefix = base.partition(".")[0]
        hidden = is_leftover(member.name.removeprefix("./"))
        join = posixpath.join
        return File(
            member.name,
            join(folder, prefix),
            join(folder, stem),
            extension,
            kind,
            hidden,
            member.content,
            member.problem,
            member.offset,
        )


@dataclass(frozen=True)
class TarSample:
    """The files of one sample, of which some may be missing."""

    key: str
    image: File | None
    text: File | None
    json: File | None
    label: File | None = None  # its class
    repeated_images: tuple[str, ...] = ()  # names of further images of this very key
    repeated_texts: tuple[str, ...] = ()


@dataclass(frozen=True)
class SeveralImages:
    """Images that share what captions there are."""

    key: str
    count: int
    detail: str


@dataclass(frozen=True)
class FurtherImages:
    """Images beside a sample's own, without captions of their own."""

    count: int


Found = TarSample | SeveralImages | FurtherImages


@dataclass
class _Group:
    """Files of one key, by what stands before the last dot of their names."""

    key: str
    stems: dict[str, list[File]] = field(default_factory=dict)
    bytes: int = 0
    split: bool = False  # known to hold samples that differ behind the first dot

    def add(self, file: File) -> None:
        self.stems.setdefault(file.stem, []).append(file)
        self.bytes += len(file.content or b"")

    @property
    def files(self) -> list[File]:
        return [file for files in self.stems.values() for file in files]


class Grouping:
    """Files come in, samples come out, as soon as the next one begins."""

    def __init__(self, pattern: re.Pattern[str] | None, keep_open: bool) -> None:
        """Args:
        pattern: its first group is the key of a file, by its name; None: by the dots.
        keep_open: nothing is complete before `close`, so that files of a sample may lie anywhere.
        """
        self._pattern = pattern
        self._keep_open = keep_open
        self._open: dict[str, _Group] = {}

    def add(self, file: File) -> Iterator[Found]:
        """Take a file; yields what it completes."""
        key = self._key(file)
        if not self._keep_open and key not in self._open:
            yield from self.close()
        group = self._open.setdefault(key, _Group(key))
        if not self._keep_open and self._pattern is None and group.stems and file.stem not in group.stems:
            yield from _told_apart(group)
        group.add(file)

    def close(self) -> Iterator[Found]:
        """The end: whatever is left."""
        groups, self._open = list(self._open.values()), {}
        for group in groups:
            if self._pattern is None:
                yield from _found(group)
            else:
                yield _sample(group.key, group.files)

    def _key(self, file: File) -> str:
        if self._pattern is None:
            return file.prefix
        match = self._pattern.match(file.name)
        return match[1] if match and match[1] else file.name  # what does not match lacks the other files of a sample


def _told_apart(group: _Group) -> Iterator[Found]:
    """The samples of an open group so far, if it is one of samples that differ behind the first dot."""
    if group.split or _with_own_caption(group, enough=2) == 2 or group.bytes > _LARGEST_GROUP:
        group.split = True
        for stem, files in group.stems.items():
            yield _sample(stem, files)
        group.stems, group.bytes = {}, 0


def _with_own_caption(group: _Group, enough: int) -> int:
    """How many stems have an image and a caption or metadata; counts no further than `enough`."""
    count = 0
    for files in group.stems.values():
        count += _has(files, "image") and _has(files, *_TOLD)
        if count == enough:
            break
    return count


def _found(group: _Group) -> Iterator[Found]:
    """The samples of a group that is complete."""
    images = {stem: files for stem, files in group.stems.items() if _has(files, "image")}
    own = [stem for stem, files in images.items() if _has(files, *_TOLD)]
    captioned = any(_has(files, *_TOLD) for files in group.stems.values())
    if len(images) <= 1 and not group.split:
        yield _sample(group.key, group.files)
    elif group.split or len(own) > 1 or not captioned:
        for stem, files in group.stems.items():
            yield _sample(stem, files)
    elif own or group.key in images:  # 007.jpg, 007.txt, 007.depth.png
        main = own[0] if own else group.key
        further = [file for file in group.files if file.kind == "image" and file.stem != main]
        yield _sample(group.key, [file for file in group.files if file not in further])
        yield FurtherImages(len(further))
    else:
        count = sum(file.kind == "image" for file in group.files)
        names = ", ".join(file.name for files in list(images.values())[:3] for file in files if file.kind == "image")
        detail = f"{count} images share their captions ({names}): set prepare.source.key_pattern"
        yield SeveralImages(group.key, count, detail)


def _has(files: list[File], *kinds: str) -> bool:
    return any(file.kind in kinds for file in files)


def _sample(key: str, files: list[File]) -> TarSample:
    """One sample of all these files. Where 007.txt and 007.tags.txt are there, the caption is the plain one."""
    images = sorted((f for f in files if f.kind == "image"), key=lambda file: IMAGES.index(file.extension))
    texts, jsons = (_plain(key, [f for f in files if f.kind == kind]) for kind in ("text", "json"))
    return TarSample(
        key,
        images[0] if images else None,
        texts[0] if texts else None,
        jsons[0] if jsons else None,
        next(iter(_plain(key, [f for f in files if f.kind == "class"])), None),
        tuple(file.name for file in images[1:]),
        tuple(file.name for file in [*texts[1:], *jsons[1:]]),
    )


def _plain(key: str, files: list[File]) -> list[File]:
    """Those with nothing between the key and the extension; all where there are none."""
    return [file for file in files if file.stem == key] or files
