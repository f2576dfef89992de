"""A row of metrics.json: a value, with what was compared, on how many images, in which features."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

Better = Literal["lower", "higher"]
OWN = "smalti"  # the protocol of metrics that follow nobody else's


@dataclass(frozen=True)
class Row:
    """One metric. `value` is None when it could not be measured; `warning` then says why."""

    metric: str
    compares: str  # which images with which
    value: float | None
    better: Better
    n_real: int
    n_generated: int
    extractor: str | None = None
    weights_sha256: str | None = None
    resize: str | None = None
    interval: tuple[float, float] | None = None
    interval_of: str | None = None
    warning: str | None = None
    protocol: str = OWN  # whose published procedure it follows: docs/evaluation.md

    def as_json(self) -> dict[str, object]:
        """The entry of metrics.json."""
        return asdict(self)

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Row:
        """The inverse of `as_json`, from a file."""
        interval = entry["interval"]
        return cls(**{**entry, "interval": None if interval is None else (interval[0], interval[1])})


def warnings(rows: Iterable[Row]) -> list[str]:
    """Each warning of `rows` once, with the metrics that it is about."""
    about: dict[str, list[str]] = {}
    for row in rows:
        if row.warning:
            about.setdefault(row.warning, []).append(row.metric)
    return [f"{', '.join(dict.fromkeys(metrics))}: {text}" for text, metrics in about.items()]
