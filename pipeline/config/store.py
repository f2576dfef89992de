"""Section `store`: how data in object stores is read. Knows no torch."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from pipeline.config.base import Config


class StoreConfig(Config):
    """Section `store`: how shards and token arrays in object stores are read, through a cache on each node's disk."""

    cache: Path | None = Field(
        None,
        description="folder of the cache, on a disk of the node's own, which its processes and runs share; null:"
        " smalti-cache-UID in the system's folder for temporary files (TMPDIR)",
    )
    cache_gigabytes: float = Field(
        100.0,
        ge=0.05,
        description="what the cache may hold; the blocks that were not used for longest make room. Token arrays should"
        " fit in, and of image shards some 150",
    )
    connections: int = Field(16, ge=1, le=256, description="requests of a process at a time")
    patience_s: float = Field(
        120.0,
        ge=0,
        description="seconds that a store which does not answer, or refuses credentials that may be renewed, is waited"
        " for",
    )
