"""The live progress bar of every stage: done, rate, time left. In a log file, a line now and then."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable
from typing import Any, NoReturn, TypeVar, overload

from tqdm import tqdm

T = TypeVar("T")
log = logging.getLogger(__name__)

LINE_EVERY_S = 10.0  # at first; the pause doubles up to
LINE_EVERY_AT_MOST_S = 300.0
_LINE = "{desc}: {n_fmt}/{total_fmt} {unit} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
_LINE_WITHOUT_TOTAL = "{desc}: {n_fmt} {unit} [{elapsed}, {rate_fmt}{postfix}]"
ON_SCREEN = "on_screen"  # set in records of what the screen shows in another form


@overload
def progress(
    items: Iterable[T], *, total: int | None = ..., description: str = ..., unit: str = ..., shown: bool = ...
) -> tqdm[T]: ...
@overload
def progress(
    *, total: int | None, initial: int = ..., description: str = ..., unit: str = ..., shown: bool = ...
) -> tqdm[NoReturn]: ...
def progress(
    items: Iterable[T] | None = None,
    *,
    total: int | None = None,
    initial: int = 0,
    description: str = "",
    unit: str = "it",
    shown: bool = True,
) -> tqdm[T] | tqdm[NoReturn]:
    """A tqdm bar; iterate over it, or call `.update(n)` and `.set_postfix_str(text)`.

    Args:
        items: what to iterate over.
        total: how many there are; by default len(items).
        initial: how many are done already.
        description: stands before the bar.
        unit: what an item is, for the rate.
        shown: False (ranks other than 0) gives a silent one.
    """
    return _Bar(
        items,
        total=total,
        initial=initial,
        desc=description,
        unit=unit,
        disable=not shown,
        smoothing=0.1,
        dynamic_ncols=True,
        mininterval=0.2,
    )


class _Bar(tqdm):  # type: ignore[type-arg]  # tqdm is generic in its stubs alone
    """A bar on a terminal; in a file lines, each after a longer pause. The lines are logged in both cases."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._live = sys.stderr.isatty()
        self._pause_s = LINE_EVERY_S
        self._next_line = time.monotonic() + self._pause_s
        self._last_line = ""
        super().__init__(*arguments, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if time.monotonic() >= self._next_line:
            self._line()
        if self._live:
            super().display(msg, pos)

    def clear(self, nolock: bool = False) -> None:
        if self._live:
            super().clear(nolock)

    def close(self) -> None:
        if not self.disable:
            self._line()
            if not self._live:
                self.disable = True  # tqdm would end the line of a bar that was never drawn
                self._decr_instances(self)  # type: ignore[attr-defined]
        super().close()

    def _line(self) -> None:
        layout = _LINE_WITHOUT_TOTAL if self.total is None else _LINE
        line = self.format_meter(**{**self.format_dict, "bar_format": layout, "ncols": None, "ascii": True})
        if line == self._last_line:
            return
        self._last_line = line
        self._next_line = time.monotonic() + self._pause_s
        self._pause_s = min(2 * self._pause_s, LINE_EVERY_AT_MOST_S)
        if not self._live:
            print(line, file=sys.stderr, flush=True)
        log.info("%s", line, extra={ON_SCREEN: True})
