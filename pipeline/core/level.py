"""One grid of codes, the word that image tokenizer, token arrays and transformer share."""

from __future__ import annotations

from typing import NamedTuple


class Level(NamedTuple):
    """`height` x `width` positions, each holding a code in [0, codebook_size)."""

    height: int
    width: int
    codebook_size: int

    @property
    def positions(self) -> int:
        return self.height * self.width
