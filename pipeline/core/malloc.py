"""What the C library's allocator keeps of memory that was freed: inside of `gives_back` none, after `keep_freed` all.

glibc takes a block of up to 32 MiB out of one row of memory, once blocks as large have been freed, and the row becomes
shorter only at its end: of a thousand shards that are laid end to end in one tensor, all stay resident behind it.
Blocks from its threshold on are mappings of their own, which go when they are freed. The threshold moves by itself
(mallopt(3), `M_MMAP_THRESHOLD`). What goes has to come back page by page: a training step on a CPU, whose activations
are blocks of a few MiB, spends up to a fifth of its time on that.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt's numbers for them
_MAPPED_FROM = 1 << 20  # bytes
_LONGEST_OF_THE_ROW = 32 << 20  # bytes; where the threshold stops when it moves by itself, with twice as much for trims
_LONGEST_KEPT, _MOST = 256 << 20, 2**31 - 1  # bytes; the most that mallopt takes


def keep_freed() -> None:
    """From here on blocks of up to 256 MiB stay with the process when they are freed, for the next step's.

    For a loop that takes and frees the same again and again. Another C library, or allocator, is left alone.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(_MMAP_THRESHOLD, _LONGEST_KEPT)
        library.mallopt(_TRIM_THRESHOLD, _MOST)


@contextmanager
def gives_back() -> Iterator[None]:
    """Inside, blocks of a MiB go back to the system when they are freed; after it as in a process that is at work.

    For what frees as much as it keeps, once: a mapping costs more time than a block that was there already. Another C
    library, or allocator, is left alone.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):
        yield
        return
    library.mallopt(_MMAP_THRESHOLD, _MAPPED_FROM)
    library.mallopt(_TRIM_THRESHOLD, _MAPPED_FROM)
    library.malloc_trim(0)  # what is free at the end of the row would be taken first
    try:
        yield
    finally:
        library.malloc_trim(0)
        library.mallopt(_MMAP_THRESHOLD, _LONGEST_OF_THE_ROW)
        library.mallopt(_TRIM_THRESHOLD, 2 * _LONGEST_OF_THE_ROW)
