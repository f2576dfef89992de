"""A folder of pictures with sidecar captions: `cat.jpg` and `cat.txt`, in any depth, local or by fsspec URL."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator

from fsspec.core import url_to_fs

from pipeline.config import digest
from pipeline.data.config import FolderSource
from pipeline.data.sources import Part, Record, Unreadable
from pipeline.errors import UserError


class Folder:
    def __init__(self, config: FolderSource) -> None:
        self.config = config
        self.files, self.root = url_to_fs(config.path)
        if not self.files.isdir(self.root):
            raise UserError(f"prepare.source.path: expected a folder of pictures, found none at {config.path}")

    def parts(self, size: int) -> Iterator[Part]:
        prefix = self.root.rstrip("/") + "/"
        found = sorted(path.removeprefix(prefix) for path in self.files.find(self.root))
        pictures = [path for path in found if posixpath.splitext(path)[1].lower() in self.config.extensions]
        if not pictures:
            raise UserError(
                f"{self.config.path}: expected pictures ({' '.join(self.config.extensions)}), "
                f"found {len(found)} files of other kinds"
            )
        for number, start in enumerate(range(0, len(pictures), size)):
            items = tuple(pictures[start : start + size])
            yield Part(number, digest(items), items)

    def records(self, part: Part) -> Iterator[Record | Unreadable]:
        for path in part.items:
            stem, extension = posixpath.splitext(path)
            try:
                image = self.files.cat_file(f"{self.root}/{path}")
            except OSError as error:
                yield Unreadable(stem, "unreadable file", str(error))
                continue
            try:
                caption = self.files.cat_file(f"{self.root}/{stem}.txt")
            except OSError:
                caption = None
            yield Record(stem, image, caption, extension.lower())
