"""The live progress bar of every stage: done, rate, time left. In a log file, a line every ten seconds."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, TypeVar, overload

from tqdm import tqdm

T = TypeVar("T")


@overload
def progress(
    items: Iterable[T], *, total: int | None = ..., description: str = ..., unit: str = ..., shown: bool = ...
) -> tqdm[T]: ...
@overload
def progress(
    *, total: int | None, initial: int = ..., description: str = ..., unit: str = ..., shown: bool = ...
) -> tqdm[Any]: ...
def progress(
    items: Iterable[Any] | None = None,
    *,
    total: int | None = None,
    initial: int = 0,
    description: str = "",
    unit: str = "it",
    shown: bool = True,
) -> tqdm[Any]:
    """A tqdm bar; iterate over it, or call `.update(n)` and `.set_postfix_str(text)`.

    `shown=False` (ranks other than 0) gives a silent one.
    """
    live = sys.stderr.isatty()
    options: dict[str, Any] = {
        "dynamic_ncols": live,
        "mininterval": 0.2 if live else 10.0,
        "maxinterval": 10.0 if live else 3600.0,
    }
    if not live:
        options |= {"ncols": 110, "ascii": True, "bar_format": "{l_bar}{bar}{r_bar}\n"}
    return tqdm(
        items, total=total, initial=initial, desc=description, unit=unit, disable=not shown, smoothing=0.1, **options
    )
