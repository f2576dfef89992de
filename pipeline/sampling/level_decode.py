"""Decoding of next-scale models: a pass for each level, whose codes are drawn at once; `pass_decode.py` begins it.

Known codes (an image prompt) stay; those of coarser levels are seen by all that is drawn, those of the same level by
none.

Shapes: P prompts, B candidates, R rows (B, or with guidance 2 B: the unprompted ones follow), N codes of all levels,
n codes of a level, V codes of its codebook, D width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pipeline.config.generate import SamplingConfig
from pipeline.sampling.draw_next import UNKNOWN
from pipeline.sampling.logits import draw, logits_in_parts
from pipeline.sampling.prompt_cache import read_prompts
from pipeline.transformer.attention_patterns import length_of
from pipeline.transformer.next_scale import NextScaleTransformer


def levels_drawn(
    model: NextScaleTransformer,
    text_PT: Tensor,
    prompt_of_B: Tensor,
    uniforms_BN: Tensor,
    codes_BN: Tensor,
    sampling: SamplingConfig,
) -> Iterator[int]:
    """As `begin` says: each level's codes into `codes`."""
    layout, twice = model.layout, sampling.guidance != 1.0
    sizes = [level.positions for level in layout.levels]
    parts = list(zip(codes_BN.split(sizes, dim=1), uniforms_BN.split(sizes, dim=1), strict=True))
    holes = [level for level, (codes_Bn, _) in enumerate(parts) if bool((codes_Bn == UNKNOWN).any())]
    if not holes:
        yield layout.image_length
        return
    none_Pn = text_PT.new_empty((len(text_PT), 0))
    _, cache = read_prompts(model, text_PT, prompt_of_B, none_Pn, twice, length_of("levels", layout))
    below = None
    for level, (codes_Bn, uniforms_Bn) in enumerate(parts[: holes[-1] + 1]):
        hidden_RnD = model.read_level(level, below, cache)
        if level in holes:
            scale = sampling.guidance_at(level / (len(sizes) - 1)) if twice else None
            in_level = sampling.in_pass(level, len(sizes))
            drawn_Bn = _draw(model, hidden_RnD, level, uniforms_Bn, in_level, scale)
            codes_Bn.copy_(torch.where(codes_Bn == UNKNOWN, drawn_Bn, codes_Bn))
            yield layout.image_length if level == holes[-1] else layout.level_starts[level + 1]
        if level < holes[-1]:
            below = model.with_level(below, codes_Bn.repeat(2, 1) if twice else codes_Bn, level)


def _draw(
    model: NextScaleTransformer,
    hidden_RnD: Tensor,
    level: int,
    uniforms_Bn: Tensor,
    sampling: SamplingConfig,
    scale: float | None,
) -> Tensor:
    """Codes of a level, [B, n]; `scale`: of guidance. A part of them at a time, for the sake of memory."""
    if uniforms_Bn.device.type != "cpu":
        uniforms_Bn = uniforms_Bn.float()  # as `draw` takes them there
    drawn: list[Tensor] = []
    for part, logits in logits_in_parts(model, hidden_RnD, level, scale):
        uniforms_Bm = uniforms_Bn[:, part]
        drawn.append(draw(logits.flatten(0, 1), uniforms_Bm.flatten(), sampling).view(uniforms_Bm.shape))
    return torch.cat(drawn, dim=1)
