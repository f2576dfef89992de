"""What stages read from outside of the run, and whether that is still what they were made from.

Orchestration knows no sources: whoever does registers, for a stage, a function that returns the stamp of what it reads.
The stamp is taken when a stage begins (`record_stamp`), stands in the manifest beside its hash, and is
compared when somebody asks for the stage to be brought up to date.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.core.atomic_io import read_json, write_json

if TYPE_CHECKING:
    from pipeline.config.pipeline import PipelineConfig

_STAMPS: dict[str, Callable[[PipelineConfig], str | None]] = {}
_FILE = "outside.json"
UNKNOWN = "-"  # a word of a stamp: of that, nothing is known


def register(stage: str, stamp: Callable[[PipelineConfig], str | None]) -> None:
    """`stamp`: of what this stage reads from outside, as it is now; None where that is not, or cannot be, asked."""
    _STAMPS[stage] = stamp


def record_stamp(directory: Path, config: PipelineConfig) -> None:
    """Write into a stage's directory the stamp of what it is about to read."""
    if directory.name in _STAMPS:
        write_json(directory / _FILE, {"stamp": _STAMPS[directory.name](config)})


def recorded_stamp(directory: Path) -> str | None:
    """The stamp that `record_stamp` wrote; None if there is none."""
    path = directory / _FILE
    stamp = read_json(path)["stamp"] if path.exists() else None
    return None if stamp is None else str(stamp)


def changes(stage: str, config: PipelineConfig, stamp: object) -> list[str]:
    """Why this stage must run again: what it reads is not what it was when it had `stamp`.

    Empty where nothing changed, and where nothing is known: of runs before there were stamps, and of what cannot be
    looked at.
    """
    if stamp is None or stage not in _STAMPS:
        return []
    now = _STAMPS[stage](config)
    # Older stamps have fewer words.
    words = zip(str(stamp).split(), "" if now is None else now.split(), strict=False)
    changed = any(before != word and UNKNOWN not in (before, word) for before, word in words)
    return ["what it reads from outside has changed"] if changed else []
