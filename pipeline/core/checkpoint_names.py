"""What the folders of a training's checkpoints are called, for all who ask how far it got. Their content: `training/`.

checkpoints/step-00001000            complete
checkpoints/step-00001000.replaced   complete, too: set aside until another one of its step is
checkpoints/step-00001000.….…        of .tmp, .trash and .damaged nothing is resumed
"""

from __future__ import annotations

import re
from pathlib import Path

REPLACED = ".replaced"
_COMPLETE = re.compile(r"step-(\d+)")
_USABLE = re.compile(rf"step-(\d+)(?:{re.escape(REPLACED)})?")


def complete_checkpoints(directory: Path) -> dict[int, Path]:
    """The folders of complete checkpoints in `directory` by step, newest first."""
    return _by_step(directory, _COMPLETE)


def saved_steps(directory: Path) -> list[int]:
    """The steps that a training can resume from, newest first: those set aside count, whose process was killed."""
    return list(_by_step(directory, _USABLE))


def _by_step(directory: Path, pattern: re.Pattern[str]) -> dict[int, Path]:
    matches = ((pattern.fullmatch(path.name), path) for path in directory.glob("step-*"))
    return dict(sorted(((int(match[1]), path) for match, path in matches if match), reverse=True))
