"""A data set of the Hugging Face `datasets` library, saved with `save_to_disk`, local or by fsspec URL.

By URL, `datasets` copies it to a temporary folder first, once per process.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from pipeline.config.base import digest
from pipeline.config.prepare import HuggingFaceSource
from pipeline.core.credentials import put_password_back, url_to_fs
from pipeline.core.errors import UserError
from pipeline.core.image_size import ImageSize
from pipeline.data.sources.base import (
    Counted,
    Item,
    Part,
    Record,
    Unreadable,
    UnreadableFile,
    content_key,
    fault,
    file_system,
    group_of,
    guarded,
    missing_package,
    read_file,
)


class HuggingFace:
    """The source `kind: huggingface`."""

    credit = None

    def __init__(self, config: HuggingFaceSource, image_size: ImageSize) -> None:
        try:
            import datasets
        except ImportError as error:
            raise missing_package("datasets", "data", "the Hugging Face source") from error
        files, path = file_system(config.path)
        if not files.isdir(path):
            raise UserError(f"prepare.source.path: expected a folder of `datasets`, found none at {config.path}")
        try:
            rows = datasets.load_from_disk(put_password_back(config.path))
        except Exception as error:  # JSON, Arrow and Python's own: whatever a damaged folder makes of them
            raise UserError(
                f"prepare.source.path: expected what `save_to_disk` writes at {config.path}: {fault(error)}"
            ) from error
        if isinstance(rows, datasets.DatasetDict):
            if config.split not in rows:
                raise UserError(f"prepare.source.split: expected one of {', '.join(rows)}, found {config.split}")
            rows = rows[config.split]
        for column in (config.image_column, config.caption_column, config.key_column, config.group_column):
            if column is not None and column not in rows.column_names:
                raise UserError(f"{config.path}: expected a column '{column}', found {', '.join(rows.column_names)}")
        # Undecoded: the same safe decoder reads the images of every source.
        try:
            self.rows = rows.cast_column(config.image_column, datasets.Image(decode=False))
        except (TypeError, ValueError) as error:
            kind = rows.features[config.image_column]
            raise UserError(
                f"{config.path}: expected images in column '{config.image_column}', found {kind}: set image_column"
            ) from error
        self.config = config
        feature = rows.features[config.caption_column]
        self.names = feature.names if isinstance(feature, datasets.ClassLabel) else None

    def parts(self, size: int) -> Iterator[Part]:
        for number, start in enumerate(range(0, len(self.rows), size)):
            items = (start, min(start + size, len(self.rows)))
            yield Part(number, digest([self.rows._fingerprint, items]), items)

    def left_out(self) -> Mapping[str, int]:
        return {}

    def records(self, part: Part) -> Iterator[Item]:
        start, stop = part.items
        for number in range(start, stop):
            yield guarded(f"row {number}", partial(self._record, number))
        yield Counted(stop - start)

    def _record(self, number: int) -> Record | Unreadable:
        config, row, where = self.config, self.rows[number], f"row {number}"
        stored = row[config.image_column] or {}
        image, path = stored.get("bytes"), stored.get("path") or ""
        if image is None and path:
            try:
                image = read_file(*url_to_fs(path))
            except UnreadableFile as error:
                return Unreadable(where, "unreadable file", str(error))
        caption = row[config.caption_column]
        if self.names is not None and isinstance(caption, int):
            caption = self.names[caption] if 0 <= caption < len(self.names) else None
        group = group_of(row[config.group_column]) if config.group_column else None
        if config.key_column is None:
            key, group = content_key(image, caption), group or content_key(image, None)
        elif row[config.key_column] is None:
            return Unreadable(where, "missing key", f"column '{config.key_column}' is empty")
        else:
            key = str(row[config.key_column])
        return Record(key, image, caption, Path(path).suffix.lower(), group=group, where=where)
