"""Parquet as a table source: which column holds the images, parts of row groups, rows with the names of their labels.

A part is (row group, first row in it, row after the last, number of its first row, stamp, image column, label names).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

from fsspec import AbstractFileSystem

from pipeline.config.base import digest
from pipeline.config.prepare import TableSource
from pipeline.core.errors import UserError
from pipeline.data.sources.base import Part, changed, fault, interrupted, stamp
from pipeline.data.sources.table_rows import Damaged, Row, check_columns

if TYPE_CHECKING:
    import pyarrow


class Parquet:
    """A Parquet file of a table source."""

    def __init__(self, config: TableSource, files: AbstractFileSystem, path: str) -> None:
        self.config, self.files, self.path = config, files, path

    def parts(self, size: int) -> Iterator[Part]:
        """Runs of at most `size` rows of each row group.

        Raises:
            UserError: it is no Parquet file, or a column is missing.
        """
        import pyarrow.parquet as pq

        with self.files.open(self.path, "rb") as raw:
            try:
                file = pq.ParquetFile(raw)
                schema = file.schema_arrow
                rows = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            except (OSError, ValueError) as error:
                raise UserError(f"{self.config.path} is not a Parquet file: {fault(error)}") from error
        image = self._image_column(schema)
        check_columns(self.config, schema.names, image)
        names = _label_names(schema, self.config.caption_column)
        mark = stamp(self.files.info(self.path))
        number = before = 0
        for group, count in enumerate(rows):
            for start in range(0, count, size):
                items = (group, start, min(start + size, count), before + start, mark, image, names)
                yield Part(number, digest([self.config.path, items]), items)
                number += 1
            before += count

    def image_column(self, part: Part) -> str:
        """The column with the images."""
        return str(part.items[5])

    def rows(self, part: Part) -> Iterator[tuple[int, Row | Damaged]]:
        """The rows with their numbers. What of them is damaged is theirs; a file that changed stops the stage."""
        import pyarrow.parquet as pq

        group, start, stop, number, mark, image, names = part.items
        config = self.config
        wanted = (config.caption_column, image, config.key_column, config.group_column)
        table: pyarrow.Table | Damaged
        try:
            with self.files.open(self.path, "rb") as raw:
                try:
                    columns = list(dict.fromkeys(name for name in wanted if name is not None))
                    table = pq.ParquetFile(raw).read_row_group(group, columns=columns)
                except Exception as error:
                    if isinstance(error, OSError) and error.errno is not None:
                        raise
                    table = Damaged(f"row group {group}: {fault(error)}")
            self.files.invalidate_cache()
            if stamp(self.files.info(self.path)) != mark:
                raise changed(self.config.path)
        except OSError as error:
            raise interrupted(self.config.path, error) from error
        for row in range(start, stop):
            yield number + row - start, table if isinstance(table, Damaged) else self._row(table, row, names)

    def _row(self, table: pyarrow.Table, row: int, names: list[str] | None) -> Row | Damaged:
        try:
            found: Row = table.slice(row, 1).to_pylist()[0]
        except Exception as error:  # text that is not UTF-8, times beyond a calendar, ...
            return Damaged(fault(error))
        label = found.get(self.config.caption_column)
        if names is not None and isinstance(label, int):
            found[self.config.caption_column] = names[label] if 0 <= label < len(names) else None
        return found

    def _image_column(self, schema: pyarrow.Schema) -> str:
        """The column that the config names, or else the one that holds {bytes, path}."""
        import pyarrow

        config = self.config
        if given := config.path_column or config.bytes_column or config.image_column:
            return given
        found = [
            field.name
            for field in schema
            if pyarrow.types.is_struct(field.type)
            and {"bytes", "path"} <= {field.type.field(n).name for n in range(field.type.num_fields)}
        ]
        if len(found) != 1:
            which = f"several ({', '.join(found)})" if found else f"none among {', '.join(schema.names)}"
            raise UserError(
                f"{config.path}: expected one column of images as {{bytes, path}}, found {which}: "
                "set prepare.source.image_column"
            )
        return str(found[0])


def _label_names(schema: pyarrow.Schema, column: str) -> list[str] | None:
    """The names of the labels in a column, where the Hugging Face hub wrote them into the schema."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        names = features[column]["names"]
        return [str(name) for name in names] if features[column]["_type"] == "ClassLabel" else None
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
