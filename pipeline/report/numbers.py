"""Numbers as people write them: metrics, durations, sizes."""

from __future__ import annotations


def metric(value: float | None) -> str:
    """Three significant digits; a dash for what was not measured."""
    if value is None:
        return "–"
    size = abs(value)
    text = f"{size:,.0f}" if size >= 100 else f"{size:.{1 if size >= 10 else 2 if size >= 1 else 3}f}"
    return f"−{text}" if value < 0 and text.strip("0.") else text


def duration(seconds: float) -> str:
    """`48 s`, `3 min 20 s`, `1 h 05 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def size(number: int) -> str:
    """`512 kB`, `3.1 MB`, `12 GB`."""
    value, units = float(number), ["B", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:.1f} {units[0]}" if 0 < value < 10 and units[0] != "B" else f"{value:.0f} {units[0]}"


def count(number: int) -> str:
    """`12,345`."""
    return f"{number:,}"
