"""The decode loop: codes drawn one after the other with a preallocated KV cache.

    codes = draw_codes(model, text, prompt_of, uniforms, SamplingConfig())      # int64 [B, N]

The prompts are read once and their cache is copied to their candidates; guidance (Ho & Salimans 2022)
runs the prompted and the unprompted half in one batch. Every candidate owns its random numbers
(`candidate_uniforms`), drawn up front, so its codes do not depend on who shares the batch. (Matrix
products of another batch size may round the last bit of a logit differently: in float32 that moves a
draw with a probability of about 1e-6, in bfloat16 of about 1e-2, hence float32 by default.)

Shapes: P prompts, B candidates (rows), T text positions, N codes of all levels, V codebook size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.sampling.config import SamplingConfig
from pipeline.text_tokenizer import PAD_ID
from pipeline.transformer.blocks import LayerCache
from pipeline.transformer.model import Cache, Transformer


def candidate_uniforms(seed: int, prompt_index: int, candidate_index: int, count: int) -> Tensor:
    """`count` numbers in [0, 1), float64, a pure function of the three integers."""
    digest = hashlib.sha256(f"{seed}/{prompt_index}/{candidate_index}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.rand(count, generator=generator, dtype=torch.float64)


@torch.inference_mode()
def draw_codes(
    model: Transformer,
    text_PT: Tensor,
    prompt_of_B: Tensor,
    uniforms_BN: Tensor,
    sampling: SamplingConfig,
    on_code: Callable[[int], object] | None = None,
) -> Tensor:
    """Draw all codes of B candidates, coarse to fine, raster order.

    Args:
        text_PT: text ids of the prompts (0: pad).
        prompt_of_B: which prompt each candidate belongs to.
        uniforms_BN: each candidate's own random numbers.
        on_code: called with the number of codes drawn so far, after each.

    Returns:
        int64 [B, N], each level's own ids (no offsets).
    """
    guided = sampling.guidance != 1.0
    rows = prompt_of_B
    if guided:  # one unprompted row is read after the prompts and shared by every candidate
        text_PT = torch.cat([text_PT, torch.full_like(text_PT[:1], PAD_ID)])
        rows = torch.cat([prompt_of_B, torch.full_like(prompt_of_B, len(text_PT) - 1)])
    prompt_cache = model.new_cache(len(text_PT))
    hidden = model.read_text(text_PT, prompt_cache)[rows]
    cache = _share(model, prompt_cache, rows)
    count = model.layout.image_length
    codes_BN = torch.zeros(len(prompt_of_B), count, dtype=torch.int64, device=text_PT.device)
    for index in range(count):
        logits = model.level_logits(hidden, model.layout.level_at(index)).float()
        if guided:
            prompted, unprompted = logits.chunk(2)
            logits = unprompted + sampling.guidance * (prompted - unprompted)
        codes_BN[:, index] = draw(logits, uniforms_BN[:, index], sampling)
        if on_code is not None:
            on_code(index + 1)
        if index + 1 < count:
            code = codes_BN[:, index]
            hidden = model.read_code(torch.cat([code, code]) if guided else code, index, cache)
    return codes_BN


def draw(logits_BV: Tensor, uniform_B: Tensor, sampling: SamplingConfig) -> Tensor:
    """One code a row by inverting the cumulative distribution at the row's uniform number: int64 [B]."""
    if sampling.temperature == 0:
        return logits_BV.argmax(dim=-1)
    logits_BV = _filter(logits_BV / sampling.temperature, sampling)
    # float64: a sum over thousands of codes must end at 1, and the uniform has 53 bits.
    cumulative = logits_BV.double().softmax(dim=-1).cumsum(dim=-1)
    target = uniform_B.to(cumulative)[:, None] * cumulative[:, -1:]
    # side "right": a code of probability 0 is never drawn, not even by a uniform of exactly 0.
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp_(max=logits_BV.shape[-1] - 1)


def _filter(logits_BV: Tensor, sampling: SamplingConfig) -> Tensor:
    if sampling.top_k is not None and sampling.top_k < logits_BV.shape[-1]:
        least = logits_BV.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least, float("-inf"))
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered, order = logits_BV.sort(dim=-1, descending=True)
        probability = ordered.softmax(dim=-1)
        # A code stays while the ones before it hold less than top_p, so the first always stays.
        dropped = probability.cumsum(dim=-1) - probability >= sampling.top_p
        logits_BV = logits_BV.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), float("-inf"))
    return logits_BV


def _share(model: Transformer, prompt_cache: Cache, rows: Tensor) -> Cache:
    """A cache with a row for each candidate, beginning with its prompt's keys and values."""
    cache = model.new_cache(len(rows))
    read = model.layout.text_length + 1
    for own, prompt in zip(cache, prompt_cache, strict=True):
        _copy(own, prompt, rows, read)
    return cache


def _copy(own: LayerCache, prompt: LayerCache, rows: Tensor, read: int) -> None:
    own.keys[:, :, :read] = prompt.keys[rows, :, :read]
    own.values[:, :, :read] = prompt.values[rows, :, :read]
