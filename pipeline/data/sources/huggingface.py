"""A data set of the Hugging Face `datasets` library, saved with `save_to_disk`, local or by fsspec URL.

By URL, `datasets` copies it to a temporary folder first, once per process.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fsspec.core import url_to_fs

from pipeline.config.base import digest
from pipeline.config.prepare import HuggingFaceSource
from pipeline.core.errors import UserError
from pipeline.data.sources.base import Part, Record, Unreadable, UnreadableFile, group_of, missing_package, read_file


class HuggingFace:
    """The source `kind: huggingface`."""

    credit = None

    def __init__(self, config: HuggingFaceSource, image_size: int) -> None:
        try:
            import datasets
        except ImportError as error:
            raise missing_package("datasets", "data", "the Hugging Face source") from error
        files, path = url_to_fs(config.path)
        if not files.isdir(path):
            raise UserError(f"prepare.source.path: expected a folder of `datasets`, found none at {config.path}")
        try:
            rows = datasets.load_from_disk(config.path)
        except (OSError, ValueError) as error:
            raise UserError(
                f"prepare.source.path: expected what `save_to_disk` writes at {config.path}: {error}"
            ) from error
        if isinstance(rows, datasets.DatasetDict):
            if config.split not in rows:
                raise UserError(f"prepare.source.split: expected one of {', '.join(rows)}, found {config.split}")
            rows = rows[config.split]
        for column in (config.image_column, config.caption_column, config.key_column, config.group_column):
            if column is not None and column not in rows.column_names:
                raise UserError(f"{config.path}: expected a column '{column}', found {', '.join(rows.column_names)}")
        # Undecoded: the same safe decoder reads the images of every source.
        self.rows = rows.cast_column(config.image_column, datasets.Image(decode=False))
        self.config = config

    def parts(self, size: int) -> Iterator[Part]:
        for number, start in enumerate(range(0, len(self.rows), size)):
            items = (start, min(start + size, len(self.rows)))
            yield Part(number, digest([self.rows._fingerprint, items]), items)

    def records(self, part: Part) -> Iterator[Record | Unreadable]:
        for number in range(*part.items):
            row = self.rows[number]
            key = f"{number:09d}" if self.config.key_column is None else str(row[self.config.key_column])
            stored = row[self.config.image_column] or {}
            image, path = stored.get("bytes"), stored.get("path") or ""
            if image is None and path:
                try:
                    image = read_file(*url_to_fs(path))
                except UnreadableFile as error:
                    yield Unreadable(key, "unreadable file", str(error))
                    continue
            group = group_of(row[self.config.group_column]) if self.config.group_column else None
            yield Record(key, image, row[self.config.caption_column], Path(path).suffix.lower(), group=group)
