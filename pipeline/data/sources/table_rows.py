"""The rows of CSV and JSONL text, one after the other, whatever is in them.

A row that cannot be read is `Damaged`, and the next one is read from the line behind it: a quote that is never closed
costs its own line, and not those up to the next quote.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from pipeline.config.prepare import TableSource
from pipeline.core.errors import UserError
from pipeline.core.text import visible

Row = dict[str, object]  # by column
_MOST_LINES = 20  # of one row: more line breaks than captions have


@dataclass(frozen=True)
class Damaged:
    """A row that cannot be read, and why."""

    detail: str


def check_columns(config: TableSource, names: Iterable[str], image: str | None) -> None:
    """Raises UserError when a column that the config names, or the images' column, is not there."""
    for wanted in (config.caption_column, image, config.key_column, config.group_column):
        if wanted is not None and wanted not in names:
            found = visible(", ".join(names))
            raise UserError(f"{config.path}: expected a column '{wanted}', found {found}")


class Lines:
    """The lines of a file, of which some can be given back."""

    def __init__(self, raw: BinaryIO) -> None:
        self.position = 0  # in bytes, behind the last line that was taken
        self._raw = raw
        self._ahead: deque[bytes] = deque()
        self.restart()

    def restart(self) -> None:
        """Digest from here."""
        self._hash = hashlib.sha256()

    @property
    def digest(self) -> str:
        """The SHA-256 of the lines since `restart`."""
        return self._hash.hexdigest()

    def peek(self, number: int) -> bytes | None:
        """The line so many behind the next one, from 0; None behind the last."""
        while len(self._ahead) <= number:
            line = self._raw.readline()
            if not line:
                return None
            self._ahead.append(line)
        return self._ahead[number]

    def take(self, lines: int = 1) -> None:
        """Go on behind so many lines, which were looked at."""
        for _ in range(lines):
            line = self._ahead.popleft()
            self.position += len(line)
            self._hash.update(line)


def text_of(line: bytes, first: bool) -> str:
    """A line as text; bytes that are not UTF-8 become surrogates, so that each such row is rejected by itself."""
    return line.removeprefix(b"\xef\xbb\xbf" if first else b"").decode("utf-8", "surrogateescape")


def json_rows(lines: Lines) -> Iterator[Row | Damaged]:
    """A row for each line that is not blank."""
    while (line := lines.peek(0)) is not None:
        text = text_of(line, first=lines.position == 0)
        lines.take()
        if not line.strip():
            continue
        try:
            row = json.loads(text)
            if not isinstance(row, dict):
                raise ValueError("not an object")
        except (ValueError, RecursionError) as error:
            yield Damaged(f"{error}: {text[:80]!r}")
            continue
        yield row


def csv_header(lines: Lines) -> tuple[str, ...]:
    """The names of the columns."""
    if lines.peek(0) is None:
        return ()
    fields, taken = _fields(lines)
    lines.take(taken)
    return (f"a header that is damaged: {fields.detail}",) if isinstance(fields, Damaged) else tuple(fields)


def csv_rows(lines: Lines, names: tuple[str, ...]) -> Iterator[Row | Damaged]:
    """A row for each record that is not blank; one with fewer fields than columns lacks the last ones."""
    while (line := lines.peek(0)) is not None:
        if not line.strip():
            lines.take()
            continue
        fields, taken = _fields(lines)
        if not isinstance(fields, Damaged) and len(fields) > len(names):
            shown = ", ".join(names)
            fields, taken = Damaged(f"{len(fields)} fields, expected {len(names)} ({shown}): quote what has commas"), 1
        lines.take(taken)
        if isinstance(fields, Damaged):
            yield fields
        else:
            yield dict(zip(names, fields, strict=False))


def _fields(lines: Lines) -> tuple[list[str] | Damaged, int]:
    """The fields of the next record, and how many lines it has; of a damaged one, the first line is it."""
    looked_at = 0
    unfinished = False

    def feed() -> Iterator[str]:
        nonlocal looked_at, unfinished
        while looked_at < _MOST_LINES and (line := lines.peek(looked_at)) is not None:
            looked_at += 1
            yield text_of(line, first=lines.position == 0 and looked_at == 1)
        unfinished = True  # within a quote, since the parser asks for more

    try:
        fields = next(csv.reader(feed()), [])
        if looked_at > 1 and not unfinished:
            # A record of several lines must be beyond doubt: else a lost quote has swallowed rows.
            again = (text_of(lines.peek(n) or b"", first=False) for n in range(looked_at))
            next(csv.reader(again, strict=True), [])
    except csv.Error as error:
        return Damaged(str(error)), 1
    if unfinished and looked_at:
        return Damaged(f"a quote that is not closed within {_MOST_LINES} lines"), 1
    return fields, max(looked_at, 1)
