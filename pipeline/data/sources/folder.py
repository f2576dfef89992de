"""A folder of images with sidecar captions: `cat.jpg` and `cat.txt`, in any depth, local or by fsspec URL; or in
folders that are named after classes.

The listing is in memory, about 450 bytes per image with its caption file, and 1.8 kB at the peak for images of one
folder: for more than some ten million, pack tars.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Mapping
from functools import partial

from pipeline.config.base import digest
from pipeline.config.prepare import FolderSource
from pipeline.core.errors import UserError
from pipeline.core.image_size import ImageSize
from pipeline.data.sources.base import (
    LARGEST_IMAGE,
    LARGEST_TEXT,
    Counted,
    Item,
    Part,
    Record,
    Unreadable,
    UnreadableFile,
    file_system,
    guarded,
    interrupted,
    is_leftover,
    is_listed,
    read_file,
)
from pipeline.data.sources.listing import list_files


class Folder:
    """The source `kind: folder`."""

    credit = None

    def __init__(self, config: FolderSource, image_size: ImageSize) -> None:
        self.config = config
        self.files, root = file_system(config.path)
        self.root = root.rstrip("/")
        self._left_out: dict[str, int] = {}

    def parts(self, size: int) -> Iterator[Part]:
        if not self.files.isdir(self.root):
            raise UserError(f"prepare.source.path: expected a folder of images, found none at {self.config.path}")
        found = list_files(self.files, self.root)
        everywhere = [path for path in found if posixpath.splitext(path)[1].lower() in self.config.extensions]
        images = sorted(path for path in everywhere if not is_leftover(path))
        hidden = len(everywhere) - len(images)
        self._left_out = {"hidden or system file": hidden} if hidden else {}
        if not images:
            raise UserError(
                f"{self.config.path}: expected images ({' '.join(self.config.extensions)}), "
                f"found {len(found)} files of other kinds"
            )
        for number, start in enumerate(range(0, len(images), size)):
            paths = images[start : start + size]
            captions = [_caption_of(path) for path in paths] if self.config.captions == "files" else paths
            items = tuple((path, caption in found) for path, caption in zip(paths, captions, strict=True))
            stamps = [(found[path], found.get(caption)) for path, caption in zip(paths, captions, strict=True)]
            yield Part(number, digest([items, stamps]), items)

    def left_out(self) -> Mapping[str, int]:
        return self._left_out

    def records(self, part: Part) -> Iterator[Item]:
        for path, has_caption in part.items:
            yield guarded(posixpath.splitext(path)[0], partial(self._record, path, has_caption))
        yield Counted(len(part.items))

    def _record(self, path: str, has_caption: bool) -> Record | Unreadable:
        stem, extension = posixpath.splitext(path)
        try:
            image = self._read(path, LARGEST_IMAGE)
            caption = self._caption(path) if has_caption else None
        except UnreadableFile as error:
            return Unreadable(stem, "unreadable file", str(error))
        return Record(stem, image, caption, extension.lower())

    def _caption(self, path: str) -> bytes | str | None:
        if self.config.captions == "folders":
            return posixpath.basename(posixpath.dirname(path)) or None
        return self._read(_caption_of(path), LARGEST_TEXT)

    def _read(self, path: str, largest: int) -> bytes:
        full = f"{self.root}/{path}"
        try:
            return read_file(self.files, full, largest)
        except UnreadableFile as error:
            if not is_listed(self.files, full):
                raise interrupted(full, "it was listed a moment ago and is gone") from error
            raise


def _caption_of(path: str) -> str:
    return posixpath.splitext(path)[0] + ".txt"
