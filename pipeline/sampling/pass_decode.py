"""Decoding of models that draw many codes at once: of order any in passes, of order scale a level a pass.

    codes = draw_in_passes(model, text, prompt_of, uniforms, SamplingConfig(passes=32))      # int64 [B, N]
    codes, passes = begin(model, text, prompt_of, uniforms, SamplingConfig())                # the same, pass by pass

A code is drawn with its candidate's own number for its position, so it does not depend on who shares the batch.

Shapes: P prompts, B candidates, N codes of all levels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeGuard

from torch import Tensor

from pipeline.config.generate import SamplingConfig
from pipeline.sampling.draw_next import UNKNOWN
from pipeline.sampling.level_decode import levels_drawn
from pipeline.sampling.parallel_decode import passes_drawn
from pipeline.transformer.any_order import AnyOrderTransformer
from pipeline.transformer.model import Transformer
from pipeline.transformer.next_scale import NextScaleTransformer

PassTransformer = AnyOrderTransformer | NextScaleTransformer


def draws_in_passes(model: Transformer) -> TypeGuard[PassTransformer]:
    """Whether this module draws its codes."""
    return isinstance(model, (AnyOrderTransformer, NextScaleTransformer))


def draw_in_passes(
    model: PassTransformer,
    text_PT: Tensor,
    prompt_of_B: Tensor,
    uniforms_BN: Tensor,
    sampling: SamplingConfig,
    known_PN: Tensor | None = None,
    on_pass: Callable[[int, Tensor], object] | None = None,
) -> Tensor:
    """As `draw_codes`."""
    codes_BN, passes = begin(model, text_PT, prompt_of_B, uniforms_BN, sampling, known_PN)
    for there in passes:
        if on_pass is not None:
            on_pass(there, codes_BN.clamp(min=0))
    return codes_BN


def begin(
    model: PassTransformer,
    text_PT: Tensor,
    prompt_of_B: Tensor,
    uniforms_BN: Tensor,
    sampling: SamplingConfig,
    known_PN: Tensor | None = None,
) -> tuple[Tensor, Iterator[int]]:
    """The codes, UNKNOWN where none is drawn yet, and an iterator: each `next` makes a pass, writes into the codes, and
    says how many there are of each image."""
    if known_PN is None:
        known_PN = text_PT.new_full((len(text_PT), model.layout.image_length), UNKNOWN)
    codes_BN = known_PN[prompt_of_B]
    if isinstance(model, NextScaleTransformer):
        return codes_BN, levels_drawn(model, text_PT, prompt_of_B, uniforms_BN, codes_BN, sampling)
    return codes_BN, passes_drawn(model, text_PT, prompt_of_B, uniforms_BN, codes_BN, sampling)
