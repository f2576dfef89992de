"""The live progress bar of every stage: done, rate, time left. In a log file, a line every ten seconds."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import NoReturn, TypeVar, overload

from tqdm import tqdm

T = TypeVar("T")


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
    live = sys.stderr.isatty()
    return tqdm(
        items,
        total=total,
        initial=initial,
        desc=description,
        unit=unit,
        disable=not shown,
        smoothing=0.1,
        dynamic_ncols=live,
        mininterval=0.2 if live else 10.0,
        maxinterval=10.0 if live else 3600.0,
        ncols=None if live else 110,
        ascii=None if live else True,
        bar_format=None if live else "{l_bar}{bar}{r_bar}\n",
    )
