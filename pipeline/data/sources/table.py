"""A CSV, JSONL or Parquet table: each row holds a caption and an image (its path; or in Parquet the image itself).

Parts are runs of bytes (CSV, JSONL) or of rows of a row group (Parquet), so a table of any length is never in memory.
A worker reads a whole Parquet row group: write those at about `shard_size` rows.
"""

from __future__ import annotations

import io
import os
import posixpath
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import islice

from fsspec.implementations.local import LocalFileSystem

from pipeline.config.base import digest
from pipeline.config.prepare import TableSource
from pipeline.core.credentials import url_to_fs
from pipeline.core.errors import UserError
from pipeline.core.image_size import ImageSize
from pipeline.core.urls import mask
from pipeline.data.sources.base import (
    Counted,
    Item,
    LeftOut,
    Part,
    Record,
    Stamp,
    Unreadable,
    UnreadableFile,
    changed,
    content_key,
    file_system,
    group_of,
    guarded,
    interrupted,
    missing_package,
    read_file,
)
from pipeline.data.sources.parquet import Parquet
from pipeline.data.sources.table_rows import Damaged, Lines, Row, check_columns, csv_header, csv_rows, json_rows
from pipeline.data.sources.web import read_url

_LOOKED_AT = 1_000  # JSONL rows that are searched for the columns


class Table:
    """The source `kind: table`."""

    credit = None

    def __init__(self, config: TableSource, image_size: ImageSize) -> None:
        self.config = config
        self.files, self.path = file_system(config.path)
        self.csv = config.path.lower().endswith(".csv")
        self.parquet: Parquet | None = None
        if config.path.lower().endswith(".parquet"):
            try:
                import pyarrow.parquet  # noqa: F401
            except ImportError as error:
                raise missing_package("pyarrow", "data", "a Parquet table") from error
            self.parquet = Parquet(config, self.files, self.path)

    def parts(self, size: int) -> Iterator[Part]:
        if not self.files.isfile(self.path):
            raise UserError(f"prepare.source.path: expected a table, found no file at {self.config.path}")
        return self.parquet.parts(size) if self.parquet is not None else self._text_parts(size)

    def left_out(self) -> Mapping[str, int]:
        return {}

    def records(self, part: Part) -> Iterator[Item]:
        if self.parquet is not None:
            rows: Iterable[tuple[int, Row | Damaged]] = self.parquet.rows(part)
            image_column: str | None = self.parquet.image_column(part)
            counted = part.items[2] - part.items[1]
        else:
            rows, counted = self._text_rows(part)
            image_column = self.config.path_column or self.config.image_column
            if within := counted - len(rows):
                yield LeftOut("line break within a field", within)
        for number, row in rows:
            where = f"row {number}"
            if isinstance(row, Damaged):
                yield Unreadable(where, "damaged row", row.detail)
            else:
                yield guarded(where, partial(self._record, where, row, image_column))
        yield Counted(counted)

    def _record(self, where: str, row: Row, image_column: str | None) -> Record | Unreadable:
        config = self.config
        found = row.get(image_column or "")
        if isinstance(found, dict) and found.keys() & {"bytes", "path"}:
            image, path = found.get("bytes"), None if found.get("bytes") else found.get("path")
        elif isinstance(found, bytes) or config.bytes_column is not None:
            image, path = found, None
        else:
            image, path = None, found
        if image is not None and not isinstance(image, bytes):
            return Unreadable(where, "not an image", f"expected bytes, found {type(image).__name__}")
        if path is not None and not isinstance(path, str):
            return Unreadable(where, "not an image", f"expected a path or bytes, found {type(path).__name__}")
        caption = row.get(config.caption_column)
        key = where if config.key_column is None else row.get(config.key_column)
        if key is None or key == "":
            return Unreadable(where, "missing key", f"column '{config.key_column}' is empty")
        group = group_of(row.get(config.group_column)) if config.group_column else None
        if config.key_column is None:
            named = mask(path) if path else ""  # a signature in a URL is no part of its name
            stem = f"{posixpath.splitext(named)[0]}-" if path else ""
            key = stem + content_key(image if image is not None else named, caption)[: 8 if path else 20]
            group = group or named or content_key(image, None)  # all captions of an image are in one split
        if path:
            try:
                image = self._read(path)
            except UnreadableFile as error:
                return Unreadable(where, "unreadable file", f"{path}: {error}")
        extension = posixpath.splitext(path)[1].lower() if path else ""
        return Record(str(key), image, caption, extension, group=group, where=where)

    def _read(self, path: str) -> bytes:
        """The image at a path or URL, which starts at the table's folder if it is relative."""
        if path.startswith(("http://", "https://")):
            return read_url(*url_to_fs(path))
        files, full = self.files, posixpath.join(posixpath.dirname(self.path), path)
        if "://" in path:
            try:
                files, full = url_to_fs(path)
            except ValueError as error:  # an unknown protocol
                raise UnreadableFile(str(error)) from error
            except ImportError as error:
                raise UserError(f"{self.config.path}: {path} needs another package: {error}") from error
        try:
            return read_file(files, full)
        except UnreadableFile as error:
            if not self.files.isfile(self.path):
                raise interrupted(self.config.path, "it was there a moment ago and is gone") from error
            raise

    # --- CSV and JSONL: a part is (first byte, byte after the last, number of the first row, names of the columns)

    def _text_parts(self, size: int) -> Iterator[Part]:
        with self.files.open(self.path, "rb") as raw:
            lines = Lines(raw)
            names = self._header(lines)
            number = row = 0
            while True:
                first = lines.position
                lines.restart()
                rows = list(islice(self._rows(lines, names), size))
                if not rows:
                    return
                yield Part(number, self._fingerprint(row, names, lines, rows), (first, lines.position, row, names))
                number, row = number + 1, row + len(rows)

    def _fingerprint(self, first: int, names: tuple[str, ...], lines: Lines, rows: list[Row | Damaged]) -> str:
        """Of the text of a part, and of the local images that it names: another one when either changes."""
        images: list[object] = []
        if isinstance(self.files, LocalFileSystem):
            column = self.config.path_column or self.config.image_column or ""
            folder = posixpath.dirname(self.path)
            images = [_local_stamp(folder, row.get(column)) for row in rows if isinstance(row, dict)]
        return digest([first, names, lines.digest, images])

    def _text_rows(self, part: Part) -> tuple[list[tuple[int, Row | Damaged]], int]:
        """The rows with their numbers; and how many lines they are, which is counted apart from them."""
        first, stop, row, names = part.items
        try:
            content = self.files.cat_file(self.path, start=first, end=stop)
        except Exception as error:
            raise interrupted(self.config.path, error) from error
        lines = Lines(io.BytesIO(content))
        found = list(self._rows(lines, names))
        if self._fingerprint(row, names, lines, found) != part.fingerprint:
            raise changed(f"{self.config.path} (or an image that it names)")
        rows = list(enumerate(found, row))
        mark = b"\xef\xbb\xbf" if not first else b""
        return rows, sum(bool(line.strip()) for line in content.removeprefix(mark).split(b"\n"))

    def _header(self, lines: Lines) -> tuple[str, ...]:
        """The names of the columns of a CSV table (of others none), once it is clear that the wanted ones are there."""
        image = self.config.path_column or self.config.image_column
        if self.csv:
            names = csv_header(lines)
            check_columns(self.config, names, image)
            return names
        with self.files.open(self.path, "rb") as raw:
            found: dict[str, None] = {}
            for _, row in zip(range(_LOOKED_AT), json_rows(Lines(raw)), strict=False):
                found |= {} if isinstance(row, Damaged) else dict.fromkeys(row)
        if found:
            check_columns(self.config, found, image)
        return ()

    def _rows(self, lines: Lines, names: tuple[str, ...]) -> Iterator[Row | Damaged]:
        return csv_rows(lines, names) if self.csv else json_rows(lines)


def _local_stamp(folder: str, path: object) -> Stamp | None:
    """Size and time of an image that a table in `folder` names; None where it is none of this machine's files."""
    if not isinstance(path, str) or "://" in path:
        return None
    try:
        about = os.stat(os.path.join(folder, path))
    except (OSError, ValueError):
        return None
    return [about.st_size, about.st_mtime_ns]
