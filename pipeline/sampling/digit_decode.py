"""Decoding of models that read and predict codes by digits (`transformer.code_groups`): code by code, digit by digit.

    codes = draw_by_digits(model, text, prompt_of, uniforms, SamplingConfig())      # int64 [B, N]

Each digit is drawn with a number of its candidate's own. Temperature, guidance, top-k, top-p and min-p are of digits.

Shapes: P prompts, B candidates, R rows (B, or with guidance 2 B: the unprompted ones follow), N codes, G digits, D
width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.config.generate import SamplingConfig
from pipeline.sampling.draw_next import UNKNOWN, given_at_start, guidance_scales
from pipeline.sampling.logits import draw, guided
from pipeline.sampling.prompt_cache import read_prompts
from pipeline.transformer.bit_groups import GroupedTransformer


def draw_by_digits(
    model: GroupedTransformer,
    text_PT: Tensor,
    prompt_of_B: Tensor,
    uniforms_BM: Tensor,
    sampling: SamplingConfig,
    known_PN: Tensor | None = None,
    on_code: Callable[[int, Tensor], object] | None = None,
) -> Tensor:
    """As `draw_codes`, with M = N G numbers."""
    layout, groups = model.layout, model.shape.code_groups
    count = layout.image_length
    known_PN = text_PT.new_full((len(text_PT), count), UNKNOWN) if known_PN is None else known_PN
    known_BN, given = known_PN[prompt_of_B], given_at_start(known_PN)
    codes_BN = known_BN.clamp(min=0)
    if given == count:
        return codes_BN
    scales = guidance_scales(sampling, layout)
    hidden, cache = read_prompts(model, text_PT, prompt_of_B, known_PN[:, :given], scales is not None, layout.length)
    for index in range(given, count):
        scale, own = None if scales is None else scales[index], uniforms_BM[:, index * groups : (index + 1) * groups]
        drawn_B = _draw_code(model, hidden, layout.level_at(index), own, sampling, scale)
        codes_BN[:, index] = torch.where(known_BN[:, index] == UNKNOWN, drawn_B, codes_BN[:, index])
        if index + 1 < count:
            hidden = model.read_code(_rows(codes_BN[:, index], scale), index, cache)
        if on_code is not None:
            on_code(index + 1, codes_BN)
    return codes_BN


def _draw_code(
    model: GroupedTransformer,
    hidden_RD: Tensor,
    level: int,
    uniforms_BG: Tensor,
    sampling: SamplingConfig,
    scale: float | None,
) -> Tensor:
    digits: list[Tensor] = []
    for uniform_B in uniforms_BG.unbind(1):
        logits = model.digit_logits(hidden_RD, [_rows(digit, scale) for digit in digits], level).float()
        digits.append(draw(guided(logits, scale), uniform_B, sampling))
    return model.code_of(digits, level)


def _rows(values_B: Tensor, scale: float | None) -> Tensor:
    """One for each row: twice the candidates where there is guidance."""
    return values_B if scale is None else values_B.repeat(2)
