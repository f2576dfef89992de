"""The splits, and which of them a sample belongs to."""

from __future__ import annotations

from pipeline.core.seeds import hash64

SPLITS = ("train", "val")


def split_of(key: str, group: str | None, validation_fraction: float) -> str:
    """The split of a sample: a hash of its group, or of its key if it has none, so it never moves when others come."""
    return "val" if hash64("split", key if group is None else group) < validation_fraction * 2**64 else "train"
