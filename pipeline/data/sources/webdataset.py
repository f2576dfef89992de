"""WebDataset tars, as img2dataset writes them: KEY.jpg|png|webp + KEY.txt + KEY.json. A tar is a part."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterator

import braceexpand
from fsspec.core import url_to_fs

from pipeline.config import digest
from pipeline.data.config import WebDatasetSource
from pipeline.data.shards import tar_samples
from pipeline.data.sources import Part, Record, Unreadable
from pipeline.errors import UserError

_IMAGES = ("png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff")


class WebDataset:
    def __init__(self, config: WebDatasetSource) -> None:
        patterns = [config.urls] if isinstance(config.urls, str) else list(config.urls)
        self.urls: list[str] = []
        for pattern in (expanded for given in patterns for expanded in braceexpand.braceexpand(given)):
            files, path = url_to_fs(pattern)
            found = sorted(files.unstrip_protocol(name) for name in files.glob(path))
            if not found:
                raise UserError(f"prepare.source.urls: expected tars at {pattern}, found none")
            self.urls += found

    def parts(self, size: int) -> Iterator[Part]:
        for number, url in enumerate(self.urls):
            files, path = url_to_fs(url)
            yield Part(number, digest([url, files.size(path), files.ukey(path)]), (url,))

    def records(self, part: Part) -> Iterator[Record | Unreadable]:
        url = part.items[0]
        name = posixpath.basename(url)
        files, path = url_to_fs(url)
        errors: list[Exception] = []
        with files.open(path, "rb") as stream:
            for sample in tar_samples(stream, url, errors):
                yield _record(sample)
        for error in errors:
            duplicate = isinstance(error, ValueError) and "duplicate file name" in str(error)
            yield Unreadable(name, "duplicate key" if duplicate else "damaged tar", str(error.args[0]))


def _record(sample: dict[str, bytes]) -> Record | Unreadable:
    key = str(sample["__key__"])
    extension = next((e for e in _IMAGES if e in sample), "")
    try:
        meta = json.loads(sample.get("json", b"{}"))
        if not isinstance(meta, dict):
            raise ValueError("not an object")
    except ValueError as error:
        return Unreadable(key, "metadata is not JSON", str(error))
    caption = sample.get("txt", meta.get("caption"))
    return Record(key, sample.get(extension), caption, f".{extension}" if extension else "", meta)
