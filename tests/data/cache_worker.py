"""A process that reads blocks through a cache: python -m tests.data.cache_worker FOLDER LOG BLOCKS SECONDS_A_FETCH

Each block is 64 KiB of its own number. A line of LOG for each that is fetched; `ready` and `right` on stdout.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from pipeline.data.block_cache import BlockCache

SIZE = 1 << 16


def content(number: int) -> bytes:
    return bytes([number % 251]) * SIZE


def read(cache: BlockCache, log: Path, number: int, fetch_s: float) -> bool:
    """Whether a block is what it should be."""

    def fetch() -> bytes:
        time.sleep(fetch_s)
        descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, f"{number}\n".encode())
        os.close(descriptor)
        return content(number)

    return cache.get(("blocks", number), SIZE, fetch)[:SIZE] == content(number)


def main(folder: Path, log: Path, blocks: int, fetch_s: float) -> None:
    cache = BlockCache(folder, 1 << 30)
    print("ready", flush=True)
    sys.stdin.readline()
    if all(read(cache, log, number, fetch_s) for number in range(blocks)):
        print("right", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
