"""Plain aligned columns."""

from __future__ import annotations

from collections.abc import Sequence


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell; empty columns are left out."""
    kept = [index for index in range(len(header)) if any(row[index] for row in rows)]
    lines = [[line[index] for index in kept] for line in (header, *rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(kept))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
