"""The decode loop: codes drawn autoregressively with a preallocated KV cache.

    codes = draw_codes(model, text, prompt_of, uniforms, SamplingConfig())      # int64 [B, N]

The prompts are read once and their cache is copied to their candidates. Guidance, unprompted + scale * (prompted -
unprompted) in `logits.guide`, runs the prompted and the unprompted half in one batch. Codes that are known already (an
image prompt) are not drawn: those at the start are read in one go, with the prompt.

Every candidate owns its random numbers (`candidate_uniforms`), drawn up front, so its codes do not depend on who shares
the batch. (Matrix products of another batch size may round the last bit of a logit differently: in float32 that moves a
draw with a probability of about 1e-6, in bfloat16 of about 1e-2, hence float32 by default.)

Shapes: P prompts, B candidates (rows), T text positions, N codes of all levels.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from pipeline.config.generate import SamplingConfig
from pipeline.core.seeds import hash64
from pipeline.sampling.cached_step import CachedDecoder
from pipeline.sampling.decode_step import ModelStep
from pipeline.sampling.digit_decode import draw_by_digits
from pipeline.sampling.draw_next import (
    UNKNOWN,
    Drawing,
    DrawNext,
    DrawWithNumbers,
    DrawWithTensors,
    given_at_start,
    guidance_scales,
)
from pipeline.sampling.pass_decode import draw_in_passes, draws_in_passes
from pipeline.sampling.prompt_cache import read_prompts
from pipeline.sampling.speculate import draw_speculating
from pipeline.sampling.static_step import StaticStep, static_length
from pipeline.transformer.any_order import AnyOrderTransformer
from pipeline.transformer.bit_groups import GroupedTransformer, of_codes
from pipeline.transformer.cross_entropy import Part, cross_entropy
from pipeline.transformer.model import Transformer
from pipeline.transformer.orders import sorted_within_levels

log = logging.getLogger(__name__)
StepKind = Literal["static", "cached", "model"]


def numbers_per_image(model: Transformer) -> int:
    """Random numbers that a candidate takes: one for each code or digit, and in any-order models one for its place."""
    return model.layout.image_length * (2 if model.order == "any" else model.shape.code_groups)


def candidate_uniforms(seed: int, prompt_index: int, candidate_index: int, count: int) -> Tensor:
    """`count` numbers in [0, 1), float64, a pure function of the three integers."""
    generator = torch.Generator().manual_seed(hash64(seed, prompt_index, candidate_index) >> 8)  # 56 bits
    return torch.rand(count, generator=generator, dtype=torch.float64)


@torch.inference_mode()
def draw_codes(
    model: Transformer,
    text_PT: Tensor,
    prompt_of_B: Tensor,
    uniforms_BN: Tensor,
    sampling: SamplingConfig,
    known_PN: Tensor | None = None,
    on_code: Callable[[int, Tensor], object] | None = None,
    compiled: bool = False,
    step: StepKind | None = None,
) -> Tensor:
    """Draw the codes of B candidates, coarse to fine, raster order; of an any-order model in `sampling.passes`,
    of a next-scale model level by level.

    Args:
        text_PT: text ids of the prompts (0: pad).
        prompt_of_B: which prompt each candidate belongs to.
        uniforms_BN: each candidate's own random numbers, `numbers_per_image` of them.
        known_PN: codes that each prompt's candidates have from the start; UNKNOWN (-1) where one is to be drawn.
        on_code: called after each code, pass or level, with the number of codes there are by now, and all codes [B, N].
        compiled: run the step through `torch.compile`.
        step: which one decodes; None: what `choose_step` says.

    Returns:
        int64 [B, N], each level's own ids (no offsets).
    """
    if draws_in_passes(model):
        return draw_in_passes(model, text_PT, prompt_of_B, uniforms_BN, sampling, known_PN, on_code)
    if isinstance(model, GroupedTransformer):
        return draw_by_digits(model, text_PT, prompt_of_B, uniforms_BN, sampling, known_PN, on_code)
    count = model.layout.image_length
    given = 0 if known_PN is None else given_at_start(known_PN)
    known_BN = None if known_PN is None else known_PN[prompt_of_B]
    codes_BN = torch.zeros_like(uniforms_BN, dtype=torch.int64) if known_BN is None else known_BN.clamp(min=0)
    if given == count:
        return codes_BN
    guided = sampling.guidance != 1.0
    step = step or choose_step(model.head.weight.device.type, compiled)
    length = static_length(model.layout.length) if step == "static" else model.layout.length
    given_Pn = text_PT.new_empty((len(text_PT), 0)) if known_PN is None else known_PN[:, :given]
    hidden, kv_cache = read_prompts(model, text_PT, prompt_of_B, given_Pn, guided, length)
    if uniforms_BN.device.type != "cpu":
        uniforms_BN = uniforms_BN.float()  # as `draw` takes them there
    drawing = Drawing(codes_BN, uniforms_BN, known_BN, sampling, guidance_scales(sampling, model.layout))
    if sampling.speculate is not None:
        if len(codes_BN) == 1 and not compiled:
            draw_speculating(model, kv_cache, hidden, drawing, given, sampling.speculate, on_code)
            return codes_BN
        _tell_that_speculation_waits()
    draw_next: DrawNext
    if step == "static":
        draw_next = DrawWithTensors(StaticStep(model, kv_cache, given, compiled), hidden, drawing)
    else:
        draw_next = DrawWithNumbers(
            (CachedDecoder if step == "cached" else ModelStep)(model, kv_cache), hidden, drawing
        )
    for index in range(given, count):
        draw_next(index)
        if on_code is not None:
            on_code(index + 1, codes_BN)
    return codes_BN


@cache
def _tell_that_speculation_waits() -> None:
    """Once a process."""
    log.info("speculate is for one image at a time, not compiled: images of one batch are drawn code by code")


def choose_step(device: str, compiled: bool = False) -> StepKind:
    """The step that decodes fastest on a type of device.

    static: on CUDA, where one graph replays it, and through `torch.compile` anywhere.
    cached: on CPUs, 2.2 times as fast there as the reference at batch 1, 1.5 times at batch 8.
    model: the reference, on other devices, and under autocast there, whose casts of weights cannot be captured.
    """
    if device == "cpu" and not compiled:
        return "cached"
    return "static" if (compiled or device == "cuda") and not torch.is_autocast_enabled(device) else "model"


def behind_hole(model: Transformer, known_N: Tensor) -> Tensor:
    """Which known codes the model predicts from drawn ones: bool [N].

    Raster: those after the first drawn one. Any order: those of its level, too. Order scale: those of finer levels.
    """
    first = given_at_start(known_N[None])
    if model.order != "raster":
        starts = [*model.layout.level_starts, model.layout.image_length]
        first = starts[model.layout.level_at(first) + (model.order == "scale")]
    behind = known_N != UNKNOWN
    behind[:first] = False
    return behind


@torch.inference_mode()
def log_likelihood(model: Transformer, text_BT: Tensor, codes_BN: Tensor, known_N: Tensor) -> Tensor:
    """log p, in nats, of the known codes `behind_hole`, given all before each: float32 [B].

    It ranks the ways to fill a hole: a good one makes what stays behind it likely. In any-order models all of a level's
    known codes come after its drawn ones.
    """
    counted = behind_hole(model, known_N)
    if isinstance(model, AnyOrderTransformer):
        order_BN = sorted_within_levels((known_N != UNKNOWN).long().expand_as(codes_BN), model.layout)
        factors = model.hidden_and_head_weights(text_BT, codes_BN, order_BN)[1:]
        codes_BN, counted = codes_BN.gather(1, order_BN), counted[order_BN[0]]
    else:
        factors = model.hidden_and_head_weights(text_BT, codes_BN)[1:]
    parts = [Part(*own, target) for own, target in zip(factors, model.targets(codes_BN), strict=True)]
    losses = of_codes(cross_entropy(parts), model.shape.code_groups)
    return -(torch.cat(losses.plain, dim=1) * counted).sum(dim=1)
