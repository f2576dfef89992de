"""From logits to a drawn code: guidance, temperature, top-k, top-p, min-p, and the draw itself.

Shapes: B rows (R with the unprompted ones of guidance), n codes that are drawn together, V codes of the level.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from pipeline.config.generate import SamplingConfig
from pipeline.transformer.model import Transformer

_LOGITS_AT_ONCE = 2**22  # of many codes that are drawn together: 16 MB in float32, which a draw copies some times
_NEVER = float("-inf")  # logit of a code that is left out
_BELOW_1 = 1 - 2**-24  # the largest float32 below 1


def guide(prompted_BV: Tensor, unprompted_BV: Tensor, scale: float | Tensor) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022, equation 6): unprompted + scale * (prompted - unprompted).

    `scale`, a number or a float32 [1] or [B, 1], is 1 + w of the paper. 1: the prompted logits themselves; 0: the
    unprompted ones; above 1: away from them.
    """
    if not isinstance(scale, Tensor) and scale == 1:
        return prompted_BV
    return torch.lerp(unprompted_BV, prompted_BV, scale)


def guided(logits_RV: Tensor, scale: float | Tensor | None) -> Tensor:
    """The logits to draw from: of rows whose second half is unprompted, guided by `scale`; None: of all as they are."""
    if scale is None:
        return logits_RV
    prompted, unprompted = logits_RV.chunk(2)
    return guide(prompted, unprompted, scale)


def logits_in_parts(
    model: Transformer, hidden_RnD: Tensor, level: int, scale: float | Tensor | None
) -> Iterator[tuple[slice, Tensor]]:
    """The logits float32 [B, m, V] to draw codes of a level from, for so many of the n at a time as memory allows."""
    at_once = max(_LOGITS_AT_ONCE // (len(hidden_RnD) * model.layout.levels[level].codebook_size), 1)
    for start in range(0, hidden_RnD.shape[1], at_once):
        part = slice(start, start + at_once)
        yield part, guided(model.level_logits(hidden_RnD[:, part], level).float(), scale)


def draw(logits_BV: Tensor, uniform_B: Tensor, sampling: SamplingConfig) -> Tensor:
    """One code per row, int64 [B], by inverting the cumulative distribution at the row's uniform number in [0, 1).

    Temperature divides the logits; 0 takes the likeliest code. Then min-p, top-k and top-p leave codes out, in this
    order, each looking at what the one before has left.
    """
    if sampling.temperature == 0:
        return logits_BV.argmax(dim=-1)
    if sampling.temperature != 1:
        logits_BV = logits_BV / sampling.temperature
    if sampling.min_p:
        logits_BV = keep_min_p(logits_BV, sampling.min_p)
    if sampling.top_k is not None and sampling.top_k < logits_BV.shape[-1]:
        logits_BV = keep_top_k(logits_BV, sampling.top_k)
    if sampling.top_p is not None and sampling.top_p < 1:
        logits_BV = keep_top_p(logits_BV, sampling.top_p)
    return (invert_in_float64 if logits_BV.device.type == "cpu" else invert_in_float32)(logits_BV, uniform_B)


def invert_in_float64(logits_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The code at which the cumulative distribution passes the uniform number: on CPUs, where float64 costs little.

    A sum over thousands of codes ends at 1, and the uniform has 53 bits. Probabilities are as exact as the logits.
    """
    cumulative = logits_BV.softmax(dim=-1).double()
    torch.cumsum(cumulative, dim=-1, out=cumulative)  # another tensor of this size costs more than the sum
    target = uniform_B.to(cumulative)[:, None] * cumulative[:, -1:]
    # side "right": a code of probability 0 is never drawn, not even by a uniform of exactly 0.
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp_(max=logits_BV.shape[-1] - 1)


def invert_in_float32(logits_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The same on GPUs, where a parallel sum may grow by a rounding at a code of probability 0: that is left out."""
    probability = logits_BV.softmax(dim=-1)
    reached = probability.cumsum(dim=-1).masked_fill_(probability == 0, 0)
    target = uniform_B.float().clamp(max=_BELOW_1)[:, None] * reached.amax(dim=-1, keepdim=True)
    return (reached > target).byte().argmax(dim=-1)  # the first of them


def keep_min_p(logits_BV: Tensor, share: float) -> Tensor:
    """Min-p (Nguyen et al. 2024): codes with p >= share * max(p) stay, the others become -inf."""
    least = logits_BV.amax(dim=-1, keepdim=True) + math.log(share)
    return logits_BV.masked_fill(logits_BV < least, _NEVER)


def keep_top_k(logits_BV: Tensor, k: int) -> Tensor:
    """Top-k (Fan et al. 2018, section 5.3): the k likeliest codes stay, and whatever ties with the last of them."""
    least = logits_BV.topk(k, dim=-1).values[:, -1:]
    return logits_BV.masked_fill(logits_BV < least, _NEVER)


def keep_top_p(logits_BV: Tensor, share: float) -> Tensor:
    """Top-p, the nucleus (Holtzman et al. 2020, section 3.1): the fewest likeliest codes that hold `share` stay."""
    ordered, order = logits_BV.sort(dim=-1, descending=True)
    probability = ordered.softmax(dim=-1)
    # A code stays while the ones before it hold less than `share`, so the first always stays.
    dropped = probability.cumsum(dim=-1) - probability >= share
    return logits_BV.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), _NEVER)
