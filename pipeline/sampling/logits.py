"""From logits to a drawn code: temperature, top-k, top-p, min-p, and the draw itself. B rows, V codes of the level."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pipeline.config.generate import SamplingConfig


def draw(logits_BV: Tensor, uniform_B: Tensor, sampling: SamplingConfig) -> Tensor:
    """One code a row by inverting the cumulative distribution at the row's uniform number: int64 [B]."""
    if sampling.temperature == 0:
        return logits_BV.argmax(dim=-1)
    if sampling.temperature != 1:
        logits_BV = logits_BV / sampling.temperature
    logits_BV = _filter(logits_BV, sampling)
    # float64: a sum over thousands of codes must end at 1, and the uniform has 53 bits.
    cumulative = logits_BV.double().softmax(dim=-1).cumsum(dim=-1)
    target = uniform_B.to(cumulative)[:, None] * cumulative[:, -1:]
    # side "right": a code of probability 0 is never drawn, not even by a uniform of exactly 0.
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp_(max=logits_BV.shape[-1] - 1)


def _filter(logits_BV: Tensor, sampling: SamplingConfig) -> Tensor:
    """-inf for what is left out. Every filter looks at the tempered distribution; top-p at what top-k has left."""
    if sampling.min_p:  # Nguyen et al. 2024: p >= min_p * max(p)
        least = logits_BV.amax(dim=-1, keepdim=True) + math.log(sampling.min_p)
        logits_BV = logits_BV.masked_fill(logits_BV < least, float("-inf"))
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
