"""A CSV, JSONL or Parquet table with a caption and a picture (path, or bytes in Parquet) a row."""

from __future__ import annotations

import csv
import io
import json
import posixpath
from collections.abc import Iterator
from itertools import islice
from typing import Any

from fsspec.core import url_to_fs

from pipeline.config import digest
from pipeline.data.config import TableSource
from pipeline.data.sources import Part, Record, Unreadable, missing_package
from pipeline.errors import UserError


class Table:
    def __init__(self, config: TableSource) -> None:
        self.config = config
        self.files, self.path = url_to_fs(config.path)
        if not self.files.isfile(self.path):
            raise UserError(f"prepare.source.path: expected a table, found no file at {config.path}")
        self.parquet = config.path.lower().endswith(".parquet")
        # Parquet may hold the pictures themselves: workers read row groups. Other tables are light: rows travel.
        if self.parquet:
            try:
                import pyarrow.parquet  # noqa: F401
            except ImportError as error:
                raise missing_package("pyarrow", "data", "a Parquet table") from error

    def parts(self, size: int) -> Iterator[Part]:
        if self.parquet:
            yield from self._row_group_parts(size)
            return
        rows = enumerate(self._csv_rows() if self.path.lower().endswith(".csv") else self._jsonl_rows())
        number = 0
        while items := tuple(islice(rows, size)):
            yield Part(number, digest(items), items)
            number += 1

    def records(self, part: Part) -> Iterator[Record | Unreadable]:
        rows = self._parquet_rows(*part.items) if self.parquet else iter(part.items)
        for number, row in rows:
            key = f"{number:09d}" if self.config.key_column is None else str(row.get(self.config.key_column))
            if "_damaged" in row:
                yield Unreadable(key, "damaged row", row["_damaged"])
                continue
            yield self._record(key, row)

    def _record(self, key: str, row: dict[str, Any]) -> Record | Unreadable:
        caption = row.get(self.config.caption_column)
        caption = caption if isinstance(caption, (str, bytes)) else None
        if self.config.bytes_column is not None:
            return Record(key, row.get(self.config.bytes_column), caption)
        path = str(row.get(self.config.path_column or "") or "")
        files, full = (self.files, posixpath.join(posixpath.dirname(self.path), path))
        if "://" in path:
            files, full = url_to_fs(path)
        try:
            return Record(key, files.cat_file(full), caption, posixpath.splitext(path)[1].lower())
        except OSError as error:
            return Unreadable(key, "unreadable file", f"{path}: {error}")

    def _check_columns(self, names: Any) -> None:
        picture = self.config.path_column or self.config.bytes_column
        for wanted in (self.config.caption_column, picture, self.config.key_column):
            if wanted is not None and wanted not in names:
                raise UserError(f"{self.config.path}: expected a column '{wanted}', found {', '.join(map(str, names))}")

    def _wanted(self, row: dict[str, Any]) -> dict[str, Any]:
        columns = (self.config.caption_column, self.config.path_column, self.config.key_column)
        return {name: row.get(name) for name in columns if name is not None}

    def _csv_rows(self) -> Iterator[dict[str, Any]]:
        with self.files.open(self.path, "rb") as raw:
            # Bytes that are not UTF-8 stay recognisable as such (surrogates) and are rejected row by row.
            reader = csv.DictReader(io.TextIOWrapper(raw, encoding="utf-8", errors="surrogateescape", newline=""))
            self._check_columns(reader.fieldnames or [])
            for row in reader:
                yield self._wanted(row)

    def _jsonl_rows(self) -> Iterator[dict[str, Any]]:
        with self.files.open(self.path, "rb") as raw:
            for number, line in enumerate(raw):
                try:
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ValueError("not an object")
                except ValueError as error:
                    yield {"_damaged": f"line {number + 1}: {error}"}
                    continue
                if number == 0:
                    self._check_columns(row)
                yield self._wanted(row)

    def _row_group_parts(self, size: int) -> Iterator[Part]:
        import pyarrow.parquet as pq

        with self.files.open(self.path, "rb") as raw:
            try:
                file = pq.ParquetFile(raw)
            except ValueError as error:
                raise UserError(f"{self.config.path} is not a Parquet file: {error}") from error
            self._check_columns(file.schema_arrow.names)
            rows = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        stamp = [self.config.path, self.files.size(self.path), rows]
        number = first = 0
        for group, count in enumerate(rows):
            for start in range(0, count, size):
                items = (group, start, min(start + size, count), first + start)
                yield Part(number, digest([stamp, items]), items)
                number += 1
            first += count

    def _parquet_rows(self, group: int, start: int, stop: int, first: int) -> Iterator[tuple[int, dict[str, Any]]]:
        import pyarrow.parquet as pq

        config = self.config
        names = (config.caption_column, config.path_column, config.bytes_column, config.key_column)
        with self.files.open(self.path, "rb") as raw:
            table = pq.ParquetFile(raw).read_row_group(group, columns=[name for name in names if name is not None])
        for offset, row in enumerate(table.slice(start, stop - start).to_pylist()):
            yield first + offset, row
