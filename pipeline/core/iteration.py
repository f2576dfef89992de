"""Iterators that Python 3.11 does not have yet."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypeVar

T = TypeVar("T")


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` consecutive items; the last may be shorter, none is empty. Takes items only when asked for."""
    if size < 1:
        raise ValueError(f"batched: expected a size of at least 1, found {size}")
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
