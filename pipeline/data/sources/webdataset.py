"""WebDataset tars, as img2dataset writes them: KEY.jpg|png|webp + KEY.txt + KEY.json. A tar is a part.

`webdataset` reads them, front to back, so any URL that fsspec opens will do.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterator
from typing import BinaryIO

import braceexpand
from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from webdataset import tariterators

from pipeline.config.base import digest
from pipeline.config.prepare import WebDatasetSource
from pipeline.core.errors import UserError
from pipeline.data.sources.base import Part, Record, Stamp, Unreadable, changed, group_of, interrupted, stamp

_Info = dict[str, object]  # fsspec's, about a file
_IMAGES = ("png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff")


class WebDataset:
    """The source `kind: webdataset`."""

    credit = None

    def __init__(self, config: WebDatasetSource, image_size: int) -> None:
        self.config = config

    def parts(self, size: int) -> Iterator[Part]:
        for number, (url, mark) in enumerate(self._tars()):
            yield Part(number, digest([url, mark]), (url, mark))

    def records(self, part: Part) -> Iterator[Record | Unreadable]:
        url, mark = part.items
        files, path = url_to_fs(url)
        errors: list[Exception] = []
        try:
            with files.open(path, "rb") as stream:
                for sample in _samples(stream, url, errors):
                    yield self._record(sample)
            files.invalidate_cache()
            if stamp(files.info(path)) != mark:
                raise changed(url)
        except OSError as error:
            raise interrupted(url, error) from error
        for damage in errors:
            if isinstance(damage, OSError):
                raise interrupted(url, damage) from damage
            key, detail = posixpath.basename(url), str(damage.args[0])
            if isinstance(damage, ValueError) and "duplicate file name" in str(damage):
                yield Unreadable(key, "duplicate key", detail)
            else:
                yield Unreadable(key, "damaged tar", detail)

    def _tars(self) -> Iterator[tuple[str, Stamp]]:
        """URL and stamp of every tar, in the order of the patterns."""
        patterns = [self.config.urls] if isinstance(self.config.urls, str) else list(self.config.urls)
        listed: dict[str, dict[str, _Info]] = {}  # by folder: thousands of tars cost one request, not one each
        for pattern in (expanded for given in patterns for expanded in braceexpand.braceexpand(given)):
            files, path = url_to_fs(pattern)
            if set(path) & set("*?["):
                found = files.glob(path, detail=True)
            else:
                folder = posixpath.dirname(path)
                if folder not in listed:
                    listed[folder] = _entries(files, folder)
                found = {path: listed[folder][path]} if path in listed[folder] else {}
            if not found:
                raise UserError(f"prepare.source.urls: expected tars at {pattern}, found none")
            for name in sorted(found):
                yield files.unstrip_protocol(name), stamp(found[name])

    def _record(self, sample: dict[str, bytes]) -> Record | Unreadable:
        key = str(sample["__key__"])
        extension = next((e for e in _IMAGES if e in sample), "")
        try:
            meta = json.loads(sample.get("json", b"{}"))
            if not isinstance(meta, dict):
                raise ValueError("not an object")
        except ValueError as error:
            return Unreadable(key, "metadata is not JSON", str(error))
        caption = sample.get("txt", meta.get("caption"))
        group = group_of(meta.get(self.config.group_field)) if self.config.group_field else None
        return Record(key, sample.get(extension), caption, f".{extension}" if extension else "", meta, group)


def _samples(stream: BinaryIO, name: str, errors: list[Exception]) -> Iterator[dict[str, bytes]]:
    """The samples of one WebDataset tar, {"__key__": key, "png": bytes, ...}, read front to back by `webdataset`.

    Damage ends up in `errors`; what could be read before it is yielded.
    """

    def note(error: Exception) -> bool:
        errors.append(error)
        return True

    files = tariterators.tar_file_expander([{"url": name, "stream": stream}], handler=note)
    yield from tariterators.group_by_keys(files, handler=note)


def _entries(files: AbstractFileSystem, folder: str) -> dict[str, _Info]:
    """What fsspec knows of each file of a folder, by path; nothing where the folder cannot be listed."""
    try:
        return {entry["name"]: entry for entry in files.ls(folder, detail=True)}
    except OSError:
        return {}
