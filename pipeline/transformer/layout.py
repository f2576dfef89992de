"""Where text and image codes sit in the sequence and in the one vocabulary. Pure arithmetic, no torch.

Sequence, T text positions and N = n_0 + n_1 + ... code positions (levels coarse to fine, raster order):

    position  0      1 ... T         T+1 ... T+N-1
    input     start  text            codes but the last
    target    text   ... | code 0    code 1 ... code N-1

so targets 0..T-1 are text and T..T+N-1 are codes. Vocabulary:

    [text | level 0 | level 1 | ... | a pad for each text position | start]
     <-------- can be predicted --->  <----- only ever read ------------->
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from pipeline.core.level import Level


@dataclass(frozen=True)
class Layout:
    """Sizes of text and levels, and from them every offset in sequence and vocabulary."""

    text_length: int
    text_vocab_size: int
    levels: tuple[Level, ...]

    @classmethod
    def of(cls, text_length: int, text_vocab_size: int, levels: Iterable[tuple[int, int, int]]) -> Layout:
        """From `levels` (or triples) of an image tokenizer or of token arrays, coarse to fine."""
        return cls(text_length, text_vocab_size, tuple(Level(*map(int, level)) for level in levels))

    @property
    def image_length(self) -> int:
        return sum(level.positions for level in self.levels)

    @property
    def length(self) -> int:
        """Positions of the whole sequence, T + N."""
        return self.text_length + self.image_length

    @property
    def level_starts(self) -> list[int]:
        """Index of each level's first code among the N codes."""
        return list(accumulate((level.positions for level in self.levels), initial=0))[:-1]

    @property
    def level_offsets(self) -> list[int]:
        """Id of each level's code 0 in the one vocabulary."""
        sizes = (level.codebook_size for level in self.levels)
        return list(accumulate(sizes, initial=self.text_vocab_size))[:-1]

    @property
    def predictable(self) -> int:
        """Rows of the output head: text and codes."""
        return self.text_vocab_size + sum(level.codebook_size for level in self.levels)

    @property
    def pad_offset(self) -> int:
        """Id of text position 0's pad; position i's is `pad_offset + i`."""
        return self.predictable

    @property
    def start_id(self) -> int:
        return self.pad_offset + self.text_length

    @property
    def vocab_size(self) -> int:
        return self.start_id + 1

    def level_at(self, index: int) -> int:
        """The level that code `index` of the N belongs to."""
        return max(level for level, start in enumerate(self.level_starts) if start <= index)

    def to_dict(self) -> dict[str, object]:
        """What config.json holds; `from_dict` reads it back."""
        levels = [level._asdict() for level in self.levels]
        return {"text_length": self.text_length, "text_vocab_size": self.text_vocab_size, "levels": levels}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Layout:
        levels = tuple(Level(**level) for level in values["levels"])
        return cls(values["text_length"], values["text_vocab_size"], levels)
