"""One grid of codes, as image tokenizer, token arrays and transformer share it."""

from __future__ import annotations

from typing import NamedTuple


class Level(NamedTuple):
    """`height` x `width` positions, each holding a code in [0, codebook_size)."""

    height: int
    width: int
    codebook_size: int

    @property
    def positions(self) -> int:
        """How many codes the grid holds."""
        return self.height * self.width
