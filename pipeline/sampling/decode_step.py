"""One step of decoding, as the decode loop sees it, and the step that says it in the model's own words.

Shapes: B rows, D width, V codes of the level.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from pipeline.transformer.model import Cache, Transformer


class DecodeStep(Protocol):
    """A transformer and a cache that holds what has been read of B sequences. `index` counts the N codes from 0."""

    def logits(self, hidden_BD: Tensor, index: int) -> Tensor:
        """What predicts code `index`, over its level's codes: float32 [B, V]."""

    def read(self, code_B: Tensor, index: int) -> Tensor:
        """Put code `index` into the cache; returns the hidden state [B, D] that predicts the next."""


class ModelStep:
    """The reference: `Transformer.level_logits` and `Transformer.read_code`. On any device, under autocast too."""

    def __init__(self, model: Transformer, cache: Cache) -> None:
        self._model, self._cache = model, cache

    def logits(self, hidden_BD: Tensor, index: int) -> Tensor:
        return self._model.level_logits(hidden_BD, self._model.layout.level_at(index)).float()

    def read(self, code_B: Tensor, index: int) -> Tensor:
        return self._model.read_code(code_B, index, self._cache)
