"""What a stream will read is fetched ahead, in the order in which it will be read, which is known: a pure function.

    for samples in fetched_ahead(plan, blocks_of, most_ahead=200):
        …               # reads these samples, whose blocks are in the node's cache, or on their way

Nothing more is planned while so many blocks are on their way that the connections are busy, or while a share of the
cache is filled with what has not been read yet.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Generator, Iterator
from typing import TypeVar

from pipeline.data.remote_file import BLOCK_BYTES, Fetching, RemoteFile, cache_bytes

T = TypeVar("T")
log = logging.getLogger(__name__)

_ON_THEIR_WAY = 64  # blocks: several times the connections
_SHARE_OF_CACHE = 4
_QUIET, _LOOK_AT = 64, 8  # after so many batches that were there already, each eighth one is looked at
_AT_A_TIME = 8  # batches planned for one that is read: so that the first one need not wait for the plan of all


def fetched_ahead(
    plan: Iterator[T], blocks_of: Callable[[T], list[tuple[RemoteFile, int]]], most_ahead: int, read_at_once: int
) -> Generator[T, None, None]:
    """The items of `plan`, up to `most_ahead` of which are planned before they come.

    `read_at_once`: bytes that are read in an order that jumps; a warning says so if the cache is smaller.
    """
    if read_at_once > cache_bytes():
        log.warning(
            "store.cache_gigabytes=%g: %.1f GB are read at once, so blocks will be fetched again and again: raise it",
            cache_bytes() / 1e9,
            read_at_once / 1e9,
        )
    most_blocks = max(1, cache_bytes() // BLOCK_BYTES // _SHARE_OF_CACHE)
    planned: deque[tuple[T, int]] = deque()  # with how many blocks it was the first to ask for
    ahead = number = quiet = 0
    with Fetching() as fetching:
        while True:
            for _ in range(_AT_A_TIME):
                is_enough = len(planned) >= most_ahead or ahead >= most_blocks or fetching.waiting >= _ON_THEIR_WAY
                if planned and is_enough:
                    break
                item, number = next(plan), number + 1
                begun = 0
                if quiet < _QUIET or not number % _LOOK_AT:
                    begun = fetching.begin(blocks_of(item))
                    quiet = 0 if begun else quiet + 1
                ahead += begun
                planned.append((item, begun))
            item, begun = planned.popleft()
            ahead -= begun
            yield item
