"""WebDataset tars, as img2dataset writes them: KEY.jpg|png|webp + KEY.txt + KEY.json. A tar is a part.

They are read front to back, so any URL that fsspec opens will do. `tar_members.py` reads the files,
`tar_samples.py` puts those of one sample together, and here they become records.
"""

from __future__ import annotations

import json
import os
import posixpath
import re
from collections.abc import Iterator, Mapping
from typing import BinaryIO

import braceexpand
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from pipeline.config.base import digest
from pipeline.config.prepare import WebDatasetSource
from pipeline.core.credentials import without_password
from pipeline.core.errors import UserError
from pipeline.core.image_size import ImageSize
from pipeline.core.text import visible
from pipeline.core.urls import mask
from pipeline.data.places import UsersTar
from pipeline.data.sources.base import (
    LARGEST_IMAGE,
    LARGEST_TEXT,
    Counted,
    Item,
    LeftOut,
    Part,
    Record,
    Stamp,
    Unreadable,
    changed,
    file_system,
    group_of,
    guarded,
    interrupted,
    is_leftover,
    stamp,
)
from pipeline.data.sources.tar_members import DamagedTar, read_members
from pipeline.data.sources.tar_samples import IMAGES, File, FurtherImages, Grouping, SeveralImages, TarSample

_Info = dict[str, object]  # fsspec's, about a file
_REMEDY = "sort the tar by name, or set prepare.source.group: buffered"


class WebDataset:
    """The source `kind: webdataset`."""

    credit = None

    def __init__(self, config: WebDatasetSource, image_size: ImageSize) -> None:
        self.config = config

    def parts(self, size: int) -> Iterator[Part]:
        for number, (url, mark) in enumerate(tars(self.config)):
            yield Part(number, digest([url, mark]), (url, mark))

    def left_out(self) -> Mapping[str, int]:
        return {}

    def records(self, part: Part) -> Iterator[Item]:
        url, mark = part.items
        files, path = file_system(url)
        try:
            with files.open(path, "rb") as stream:
                yield from _Reading(self.config, url).items(stream)
            files.invalidate_cache()
            if stamp(files.info(path)) != mark:
                raise changed(url)
        except OSError as error:
            raise interrupted(url, error) from error


class _Reading:
    """One tar on its way to records, and what is known of it so far."""

    def __init__(self, config: WebDatasetSource, url: str) -> None:
        self.config, self.url = config, url
        self.images = self.orphans = 0
        self.complete: set[str] = set()
        # Of keys that lack an image or a caption: how many images, and whether a caption came.
        self.pieces: dict[str, tuple[int, bool]] = {}

    def items(self, stream: BinaryIO) -> Iterator[Item]:
        """All that the tar holds, and last how many images that is."""
        pattern = re.compile(self.config.key_pattern) if self.config.key_pattern else None
        grouping = Grouping(pattern, keep_open=self.config.group == "buffered")
        damage = ""
        try:
            for member in read_members(stream, self.url, _largest):
                file = File.of(member)
                self.images += file.kind == "image"
                if file.hidden:
                    if file.kind == "image":
                        yield LeftOut("hidden or system file")
                elif file.kind != "other":
                    for found in grouping.add(file):
                        yield from self._items_of(found)
        except DamagedTar as error:
            damage = str(error)
        for found in grouping.close():
            yield from self._items_of(found)
        yield from self._incomplete()
        if damage:
            yield Unreadable(posixpath.basename(self.url), "damaged tar", damage, samples=0, rest=True)
        yield Counted(self.images + self.orphans)

    def _items_of(self, found: TarSample | SeveralImages | FurtherImages) -> Iterator[Item]:
        if isinstance(found, FurtherImages):
            yield LeftOut("further image of a sample", found.count)
            return
        if isinstance(found, SeveralImages):
            yield Unreadable(found.key, "several images", found.detail, samples=found.count)
            return
        for name in found.repeated_images:
            yield Unreadable(found.key, "duplicate key", f"{name} beside another image of this key")
        record = guarded(found.key, lambda: self._record(found))
        if isinstance(record, Record) and (record.image is None or record.caption is None):
            images, caption = self.pieces.get(found.key, (0, False))
            has = (images + (record.image is not None), caption or record.caption is not None)
            self.pieces[found.key] = has
            return
        self.complete.add(found.key)
        if isinstance(record, Unreadable) and found.image is None:
            self.orphans += 1
        yield record

    def _incomplete(self) -> Iterator[Item]:
        """What lacked something when its files ended: counted once, however many pieces there were."""
        for key, (images, caption) in self.pieces.items():
            self.orphans += 0 if images else 1
            if key in self.complete and not images:
                yield LeftOut("scattered files")
            elif (images and caption) or key in self.complete:
                detail = f"the files of this sample do not lie side by side: {_REMEDY}"
                yield Unreadable(key, "scattered files", detail, samples=max(images, 1))
            elif images:
                yield Unreadable(key, "missing caption", "", samples=images)
            else:
                yield Unreadable(key, "missing image", "")

    def _record(self, sample: TarSample) -> Record | Unreadable:
        key = sample.key
        problem = next(
            (f for f in (sample.image, sample.text, sample.json, sample.label) if f is not None and f.problem), None
        )
        if problem is not None:
            return Unreadable(key, "unreadable file", f"{problem.name}: {problem.problem}")
        if sample.repeated_texts:
            return Unreadable(
                key, "several captions", f"{', '.join(sample.repeated_texts)} beside others of their kind"
            )
        try:
            meta = json.loads((sample.json.content if sample.json else None) or b"{}")
            if not isinstance(meta, dict):
                raise ValueError("not an object")
        except (ValueError, RecursionError) as error:
            return Unreadable(key, "metadata is not JSON", str(error))
        caption = sample.text.content if sample.text else meta.get("caption")
        if caption is None and sample.label is not None:
            caption = sample.label.content
        group = group_of(meta.get(self.config.group_field)) if self.config.group_field else None
        if sample.image is None:
            return Record(key, None, caption, "", meta, group)
        image = sample.image
        return Record(key, image.content, caption, f".{image.extension}", meta, group, offset=image.offset)


def tar_of(part: Part) -> UsersTar:
    """The tar that a part is. Raises UserError when it is gone, or its file system does not say how large it is."""
    url, mark = part.items
    files, path = file_system(url)
    if isinstance(files, LocalFileSystem):
        try:
            return UsersTar(str(path), os.stat(path).st_size)
        except OSError as error:
            raise interrupted(str(path), error) from error
    if not isinstance(mark[0], int):
        raise UserError(
            f"prepare.storage: in-place expects tars of known size, found {visible(mask(url))} without: set it to png, "
            "webp or jpeg, which copy what they need"
        )
    return UsersTar(url, mark[0])


def tars(config: WebDatasetSource) -> Iterator[tuple[str, Stamp]]:
    """URL and stamp of every tar, in the order of the patterns.

    Raises:
        UserError: a pattern names none.
    """
    patterns = [config.urls] if isinstance(config.urls, str) else list(config.urls)
    listed: dict[str, dict[str, _Info]] = {}  # by folder: thousands of tars cost one request, not one each
    try:
        expanded = [pattern for given in patterns for pattern in braceexpand.braceexpand(given)]
    except ValueError as error:
        raise UserError(
            f"prepare.source.urls: {visible(mask(str(error)))}: write e.g. data/{{00000..00099}}.tar"
        ) from error
    for pattern in expanded:
        files, path = file_system(pattern)
        if set(path) & set("*?["):
            found = files.glob(path, detail=True)
        else:
            folder = posixpath.dirname(path)
            if folder not in listed:
                listed[folder] = _entries(files, folder)
            found = {path: listed[folder].get(path) or _asked_for(files, path)}
        if not any(found.values()):
            raise UserError(f"prepare.source.urls: expected tars at {visible(mask(pattern))}, found none")
        for name, info in sorted(found.items()):
            # As `records` asks: there a link has its target's time, and a listing may know neither size nor time.
            if info.get("islink") or info.get("size") is None:
                info = files.info(name)
            yield without_password(files.unstrip_protocol(name)), stamp(info)


def _largest(name: str) -> int:
    """How many bytes of this member may be read; 0: it is not wanted."""
    extension = posixpath.splitext(name)[1][1:].lower()
    if is_leftover(name):
        return 0
    return LARGEST_IMAGE if extension in IMAGES else LARGEST_TEXT if extension in ("txt", "json", "cls") else 0


def _entries(files: AbstractFileSystem, folder: str) -> dict[str, _Info]:
    """What fsspec knows of each file of a folder, by path; nothing where the folder cannot be listed."""
    try:
        return {entry["name"]: entry for entry in files.ls(folder, detail=True)}
    except Exception:  # each kind of storage has its own; the tars themselves may be there all the same
        return {}


def _asked_for(files: AbstractFileSystem, path: str) -> _Info:
    """What fsspec knows of a file that its folder does not list; nothing where it is not there."""
    try:
        info: _Info = files.info(path)
        return info
    except (FileNotFoundError, NotADirectoryError):
        return {}
