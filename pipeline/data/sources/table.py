"""A CSV, JSONL or Parquet table: each row holds a caption and an image (path, or bytes in Parquet).

Parts are runs of bytes (CSV, JSONL) or of rows of a row group (Parquet), so a table of any length is never in memory.
A worker reads a whole Parquet row group: write those at about `shard_size` rows.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import posixpath
from collections.abc import Iterable, Iterator
from typing import BinaryIO

from fsspec.core import url_to_fs

from pipeline.config.base import digest
from pipeline.config.prepare import TableSource
from pipeline.core.errors import UserError
from pipeline.data.sources.base import (
    Part,
    Record,
    Unreadable,
    UnreadableFile,
    changed,
    group_of,
    interrupted,
    missing_package,
    read_file,
    stamp,
)

Row = dict[str, object]  # by column
_DAMAGED = "_damaged"  # stands for the columns of a row that cannot be read, and says why


class Table:
    """The source `kind: table`."""

    credit = None

    def __init__(self, config: TableSource, image_size: int) -> None:
        self.config = config
        self.files, self.path = url_to_fs(config.path)
        self.parquet = config.path.lower().endswith(".parquet")
        self.csv = config.path.lower().endswith(".csv")
        if self.parquet:
            try:
                import pyarrow.parquet  # noqa: F401
            except ImportError as error:
                raise missing_package("pyarrow", "data", "a Parquet table") from error

    def parts(self, size: int) -> Iterator[Part]:
        if not self.files.isfile(self.path):
            raise UserError(f"prepare.source.path: expected a table, found no file at {self.config.path}")
        return self._row_group_parts(size) if self.parquet else self._text_parts(size)

    def records(self, part: Part) -> Iterator[Record | Unreadable]:
        for number, row in self._parquet_rows(part) if self.parquet else self._text_rows(part):
            key = f"{number:09d}" if self.config.key_column is None else str(row.get(self.config.key_column))
            if _DAMAGED in row:
                yield Unreadable(key, "damaged row", str(row[_DAMAGED]))
                continue
            yield self._record(key, row)

    def _record(self, key: str, row: Row) -> Record | Unreadable:
        caption = row.get(self.config.caption_column)
        caption = caption if isinstance(caption, (str, bytes)) else None
        group = group_of(row.get(self.config.group_column)) if self.config.group_column else None
        if self.config.bytes_column is not None:
            image = row.get(self.config.bytes_column)
            if image is not None and not isinstance(image, bytes):
                return Unreadable(key, "not an image", f"expected bytes, found {type(image).__name__}")
            return Record(key, image, caption, group=group)
        path = str(row.get(self.config.path_column or "") or "")
        files, full = (self.files, posixpath.join(posixpath.dirname(self.path), path))
        if "://" in path:
            files, full = url_to_fs(path)
        try:
            return Record(key, read_file(files, full), caption, posixpath.splitext(path)[1].lower(), group=group)
        except UnreadableFile as error:
            if not self.files.isfile(self.path):
                raise interrupted(self.config.path, "it was there a moment ago and is gone") from error
            return Unreadable(key, "unreadable file", f"{path}: {error}")

    def _check_columns(self, names: Iterable[str]) -> None:
        config = self.config
        image = config.path_column or config.bytes_column
        for wanted in (config.caption_column, image, config.key_column, config.group_column):
            if wanted is not None and wanted not in names:
                raise UserError(f"{config.path}: expected a column '{wanted}', found {', '.join(names)}")

    # --- CSV and JSONL: a part is (first byte, byte after the last, number of the first row, names of the columns)

    def _text_parts(self, size: int) -> Iterator[Part]:
        with self.files.open(self.path, "rb") as raw:
            lines = _Lines(raw)
            names = self._header(lines)
            number = row = 0
            while True:
                first = lines.position
                lines.restart()
                rows = _take(self._rows(lines, names), size)
                if not rows:
                    return
                yield Part(number, digest([row, names, lines.digest]), (first, lines.position, row, names))
                number, row = number + 1, row + rows

    def _text_rows(self, part: Part) -> Iterator[tuple[int, Row]]:
        first, stop, row, names = part.items
        try:
            content = self.files.cat_file(self.path, start=first, end=stop)
        except Exception as error:
            raise interrupted(self.config.path, error) from error
        lines = _Lines(io.BytesIO(content))
        rows = list(enumerate(self._rows(lines, names), row))
        if digest([row, names, lines.digest]) != part.fingerprint:
            raise changed(self.config.path)
        yield from rows

    def _header(self, lines: _Lines) -> tuple[str, ...]:
        """The names of the columns of a CSV table (of others none), once it is clear that the wanted ones are there."""
        if self.csv:
            names = next(csv.reader(_decoded(lines)), [])
            self._check_columns(names)
            return tuple(names)
        with self.files.open(self.path, "rb") as raw:
            first = next(self._json_rows(_Lines(raw)), {_DAMAGED: ""})
        if _DAMAGED not in first:
            self._check_columns(first)
        return ()

    def _rows(self, lines: _Lines, names: tuple[str, ...]) -> Iterator[Row]:
        if not self.csv:
            yield from self._json_rows(lines)
            return
        try:
            yield from csv.DictReader(_decoded(lines), names)
        except csv.Error as error:
            raise UserError(
                f"{self.config.path} is no CSV table before byte {lines.position}: {error}: mend that row"
            ) from error

    def _json_rows(self, lines: _Lines) -> Iterator[Row]:
        for line in lines:
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("not an object")
            except ValueError as error:
                yield {_DAMAGED: f"{error}: {line[:80]!r}"}
                continue
            yield row

    # --- Parquet: a part is (row group, first row in it, row after the last, number of its first row, stamp)

    def _row_group_parts(self, size: int) -> Iterator[Part]:
        import pyarrow.parquet as pq

        with self.files.open(self.path, "rb") as raw:
            try:
                file = pq.ParquetFile(raw)
            except ValueError as error:
                raise UserError(f"{self.config.path} is not a Parquet file: {error}") from error
            self._check_columns(file.schema_arrow.names)
            rows = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        mark = stamp(self.files.info(self.path))
        number = before = 0
        for group, count in enumerate(rows):
            for start in range(0, count, size):
                items = (group, start, min(start + size, count), before + start, mark)
                yield Part(number, digest([self.config.path, items]), items)
                number += 1
            before += count

    def _parquet_rows(self, part: Part) -> Iterator[tuple[int, Row]]:
        import pyarrow.parquet as pq

        group, start, stop, number, mark = part.items
        c = self.config
        names = (c.caption_column, c.path_column, c.bytes_column, c.key_column, c.group_column)
        try:
            with self.files.open(self.path, "rb") as raw:
                table = pq.ParquetFile(raw).read_row_group(group, columns=[name for name in names if name is not None])
            self.files.invalidate_cache()
            if stamp(self.files.info(self.path)) != mark:
                raise changed(self.config.path)
        except (OSError, ValueError) as error:
            raise interrupted(self.config.path, error) from error
        for offset, row in enumerate(table.slice(start, stop - start).to_pylist()):
            yield number + offset, row


class _Lines:
    """The lines of a file, with the position in bytes after the latest, and a digest of those since `restart`."""

    def __init__(self, raw: BinaryIO) -> None:
        self.position = 0
        self._raw = raw
        self.restart()

    def restart(self) -> None:
        """Begin a new digest."""
        self._hash = hashlib.sha256()

    @property
    def digest(self) -> str:
        """The SHA-256 of the lines since `restart`."""
        return self._hash.hexdigest()

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> bytes:
        line: bytes = self._raw.readline()
        if not line:
            raise StopIteration
        self.position += len(line)
        self._hash.update(line)
        return line


def _decoded(lines: _Lines) -> Iterator[str]:
    """The lines as text; bytes that are not UTF-8 become surrogates, so that each such row is rejected by itself."""
    for line in lines:
        text = line.decode("utf-8", "surrogateescape")
        yield text.removeprefix("\ufeff") if lines.position == len(line) else text


def _take(rows: Iterator[Row], count: int) -> int:
    """Read `count` rows, or those that there are; returns how many."""
    taken = 0
    while taken < count and next(rows, None) is not None:
        taken += 1
    return taken
