"""Runs cases by number and collects what must not be."""

from __future__ import annotations

import contextlib
import logging
import signal
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from types import FrameType

from tests.fuzz import command_cases, data_cases

LIMIT_S = 60
Case = Callable[[Path, Random], None]


@dataclass(frozen=True)
class Found:
    """A case that went wrong: its name, what was wrong, and where."""

    case: str
    what: str
    where: str


def cases(run: Path | None) -> dict[str, Case]:
    """The kinds of cases. Those of run directories need a finished run."""
    kinds: dict[str, Case] = {
        **data_cases.CASES,
        "config": command_cases.config,
        "cluster": command_cases.cluster,
        "cli": command_cases.command_line,
    }
    return kinds | ({"run": partial(command_cases.run_directory, original=run)} if run else {})


def fuzz(kinds: dict[str, Case], seed: int, numbers: Sequence[int]) -> Iterator[Found | None]:
    """Run the cases of these numbers, of each kind in turn; yields what was wrong with each."""
    names = list(kinds)
    for number in numbers:
        name = names[number % len(names)]
        yield run_case(kinds[name], f"{name}:{seed}:{number}")


def run_case(case: Case, label: str) -> Found | None:
    """Run one case in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder, _quiet(), _time_limit():
        try:
            case(Path(folder), Random(label))
        except data_cases.Finding as finding:
            return Found(label, str(finding), "")
        except BaseException as error:  # whatever it is, a user would see it
            if isinstance(error, KeyboardInterrupt):
                raise
            frames = [f for f in traceback.extract_tb(error.__traceback__) if "/pipeline/" in f.filename]
            where = f"{frames[-1].filename.partition('/pipeline/')[2]}:{frames[-1].lineno}" if frames else "?"
            return Found(label, f"{type(error).__name__}: {str(error)[:300]}", where)
    return None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    with open("/dev/null", "w") as nowhere, contextlib.redirect_stderr(nowhere):
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    def ring(_number: int, _frame: FrameType | None) -> None:
        raise TimeoutError(f"no end after {LIMIT_S} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(LIMIT_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
