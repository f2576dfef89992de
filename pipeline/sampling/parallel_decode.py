"""Decoding in passes, for any-order models: each pass reads the codes of the one before and asks for the next ones.

`pass_decode.py` begins it.

The codes of a pass are drawn each for itself, from what was there before the pass: many codes a pass are fast, one a
pass is the model's own distribution. Levels come coarse to fine, and within a level known codes (an image prompt)
before all others: what is drawn knows them on all sides.

The order `random` is the candidate's own, as its numbers are: neither depends on who shares the batch.

Shapes: P prompts, B candidates, R rows (B, or with guidance 2 B: the unprompted ones follow), N codes of all levels,
n codes of a pass, V codes of the level.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

from pipeline.config.generate import SamplingConfig
from pipeline.sampling.draw_next import UNKNOWN, guidance_scales
from pipeline.sampling.logits import draw, logits_in_parts
from pipeline.sampling.prompt_cache import read_prompts
from pipeline.transformer.any_order import AnyOrderTransformer
from pipeline.transformer.layout import Layout
from pipeline.transformer.orders import sorted_within_levels


def passes_drawn(
    model: AnyOrderTransformer,
    text_PT: Tensor,
    prompt_of_B: Tensor,
    uniforms_BN: Tensor,
    codes_BN: Tensor,
    sampling: SamplingConfig,
) -> Iterator[int]:
    """As `begin` says: the codes of each pass into `codes`. `uniforms` [B, 2 N] hold the numbers of the codes, then
    those of their places in the order.

    The same codes must be known of all.
    """
    layout = model.layout
    holes = (codes_BN == UNKNOWN).any(0)
    if not torch.equal(holes.expand_as(codes_BN), codes_BN == UNKNOWN):
        raise ValueError("expected the same codes to be known of all prompts")
    drawing = _Drawing(model, text_PT, prompt_of_B, uniforms_BN, codes_BN, sampling)
    return _passes(drawing, layout, _order(layout, uniforms_BN, holes, sampling), holes, sampling)


def _passes(
    drawing: _Drawing, layout: Layout, order_BN: Tensor, holes: Tensor, sampling: SamplingConfig
) -> Iterator[int]:
    left = [int(part.sum()) for part in holes.split([level.positions for level in layout.levels])]
    for level, passes in enumerate(codes_per_pass(layout, left, sampling)):
        start, end = layout.level_starts[level], layout.level_starts[level] + layout.levels[level].positions
        drawing.begin_level(level, order_BN[:, start:end], known=end - start - left[level])
        for index, count in enumerate(passes):
            drawing.run(count, sampling.in_pass(index, len(passes)))
            yield start + drawing.there
    if not left[-1]:
        yield layout.image_length


class _Drawing:
    """The codes of B candidates while they are drawn, level by level and pass by pass."""

    def __init__(
        self,
        model: AnyOrderTransformer,
        text_PT: Tensor,
        prompt_of_B: Tensor,
        uniforms_BN: Tensor,
        codes_BN: Tensor,
        sampling: SamplingConfig,
    ) -> None:
        self._model, self._codes = model, codes_BN
        self._uniforms = uniforms_BN if uniforms_BN.device.type == "cpu" else uniforms_BN.float()
        self._scales = guidance_scales(sampling, model.layout)
        none_Pn = text_PT.new_empty((len(text_PT), 0))
        length, twice = model.layout.length, self._scales is not None
        _, self._cache = read_prompts(model, text_PT, prompt_of_B, none_Pn, twice, length)
        self._read, self._unread = 0, codes_BN[:, :0]  # how many codes are in the cache, and which to read next

    def begin_level(self, level: int, order_Bn: Tensor, known: int) -> None:
        """`order` holds the positions of the level's codes; the first `known` of them are there."""
        self._level, self.there = level, known
        self._unread = torch.cat([self._unread, order_Bn[:, :known]], dim=1)
        self._left = order_Bn[:, known:]

    def run(self, count: int, sampling: SamplingConfig) -> None:
        """One pass: draw `count` codes of what is left of the level."""
        surest = sampling.pass_order == "confidence"
        asked = self._left if surest else self._left[:, :count]
        uniforms, codes = self._uniforms.gather(1, asked), torch.empty_like(asked)
        sure = torch.empty(asked.shape, device=asked.device)
        for part, logits in self._logits(asked):
            drawn = draw(logits.flatten(0, 1), uniforms[:, part].flatten(), sampling)
            codes[:, part] = drawn.view(len(codes), -1)
            if surest:
                sure[:, part] = logits.log_softmax(dim=-1).gather(-1, codes[:, part, None])[..., 0]
        if surest:
            ranks = sure.argsort(dim=1, descending=True, stable=True)
            asked, codes = asked.gather(1, ranks), codes.gather(1, ranks)
        taken, self._left = (asked if surest else self._left).tensor_split([count], dim=1)
        self._codes.scatter_(1, taken, codes[:, :count])
        self._unread = taken
        self.there += count

    def _logits(self, asked_Bn: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """What predicts the codes at `asked`, from all that are there, a part at a time. Reads the unread ones."""
        once = self._scales is None
        codes, read, asked = (
            x if once else x.repeat(2, 1) for x in (self._codes.gather(1, self._unread), self._unread, asked_Bn)
        )  # [R, …]
        hidden = self._model.read_and_ask(codes, read, asked, self._cache, self._read)
        self._read += read.shape[1]
        there = self._model.layout.level_starts[self._level] + self.there
        scale = None if self._scales is None else self._scales[there]
        return logits_in_parts(self._model, hidden, self._level, scale)


def codes_per_pass(layout: Layout, left: Sequence[int], sampling: SamplingConfig) -> list[list[int]]:
    """How many codes each pass draws, for each level, of which so many are `left`.

    Levels share `passes` by their sizes; one with fewer codes left than passes takes one a pass. Schedules: linear, as
    many in each; cosine, 1 - cos(pi / 2 t) of them by the part t of the passes (Chang et al. 2022, section 3.3).
    """
    sizes = [level.positions for level in layout.levels]
    total = sampling.passes or sum(sizes)
    shares = [sum(sizes[: i + 1]) / sum(sizes) for i in range(len(sizes))]
    passes = _differences(_rising(total, shares))
    found: list[list[int]] = []
    for count, most in zip(left, passes, strict=True):
        own = min(count, most)
        parts = [(i + 1) / own for i in range(own)]
        if sampling.schedule == "cosine":
            parts = [1 - math.cos(math.pi / 2 * part) for part in parts]
        found.append(_differences(_rising(count, parts)))
    return found


def _rising(total: int, parts: Sequence[float]) -> list[int]:
    """Whole numbers near total × part, each above the one before, the last one `total`."""
    ends: list[int] = []
    for i, part in enumerate(parts):
        least, most = (ends[-1] if ends else 0) + 1, total - (len(parts) - 1 - i)
        ends.append(min(max(round(total * part), least), most))
    return ends


def _differences(ends: Sequence[int]) -> list[int]:
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def _order(layout: Layout, uniforms_BN: Tensor, holes_N: Tensor, sampling: SamplingConfig) -> Tensor:
    """The order of all codes: within each level first the known ones, then those that are drawn, int64 [B, N]."""
    count = layout.image_length
    keys_BN = uniforms_BN[:, count:]
    if sampling.pass_order == "halton":
        ranks = [rank / level.positions for level in layout.levels for rank in halton_ranks(level.height, level.width)]
        keys_BN = torch.tensor(ranks, dtype=keys_BN.dtype, device=keys_BN.device).expand(len(keys_BN), -1)
    return sorted_within_levels(keys_BN + holes_N, layout)


@cache
def halton_ranks(height: int, width: int) -> tuple[int, ...]:
    """Each cell's place in an order that spreads over the whole grid at any time, row by row.

    Cells as the points of the Halton sequence of bases 2 and 3 first meet them (Besnier et al. 2025, whose scheduler
    this is).
    """
    ranks: dict[int, int] = {}
    point = 0
    while len(ranks) < height * width:
        cell = int(_radical_inverse(point, 2) * height) * width + int(_radical_inverse(point, 3) * width)
        ranks.setdefault(cell, len(ranks))
        point += 1
    return tuple(ranks[cell] for cell in range(height * width))


def _radical_inverse(number: int, base: int) -> float:
    """The digits of `number` mirrored at the point, in [0, 1)."""
    value, weight = 0.0, 1.0
    while number:
        weight /= base
        number, digit = divmod(number, base)
        value += digit * weight
    return value
