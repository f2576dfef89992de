"""What a check finds, and how checks are run: none of them ends the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from pipeline.core.errors import UserError
from pipeline.core.text import one_line


class Level(StrEnum):
    """How bad it is. Only `FAIL` stops work; `NOTE` is for those who want what is missing."""

    OK = "ok"
    NOTE = "note"
    WARN = "warn"
    FAIL = "FAIL"


@dataclass(frozen=True)
class Finding:
    """One line of the report. Where `level` is not OK, `text` says what was expected, found, and what to do."""

    level: Level
    name: str
    text: str


Check = Callable[[], Iterable[Finding]]


def ok(name: str, text: str) -> Finding:
    return Finding(Level.OK, name, text)


def note(name: str, text: str) -> Finding:
    return Finding(Level.NOTE, name, text)


def warn(name: str, text: str) -> Finding:
    return Finding(Level.WARN, name, text)


def fail(name: str, text: str) -> Finding:
    return Finding(Level.FAIL, name, text)


def findings(name: str, check: Check) -> Iterator[Finding]:
    """What `check` finds; an error of its own is a finding too, called `name`."""
    try:
        yield from check()
    except UserError as error:
        yield fail(name, str(error))
    except Exception as error:  # a broken library or file system may raise anything, and the next check shall run
        yield fail(name, f"{type(error).__name__}: {one_line(str(error)) or 'no message'}")
