"""Large codebooks by parts: a code as a few digits, each with rows of its own in the embedding and in the head.

A codebook of K = d_0 · d_1 · … codes (2^16 as 256 · 256: groups of a binary quantizer's bits) takes d_0 + d_1 + … rows
where it took K. A code's embedding is the sum of its digits'. Its probability is the product of its digits', each
given those before it (as in Luo et al. 2024, "Open-MAGVIT2", with another network for it):

    p(code | h) = Π_i softmax(head_i h_i)[digit_i]        h_0 = h        h_i = h + f(h + Σ_{j<i} given_j[digit_j])

    f(x) = out · GELU(in · norm(x)), one for all digits; it starts at zero

Shapes: B batch, n codes of a level, D width, G digits, d_i values of digit i.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config.transformer import TransformerShape
from pipeline.core.errors import UserError
from pipeline.core.level import Level
from pipeline.core.objective import ParameterGroup
from pipeline.transformer.cross_entropy import Losses
from pipeline.transformer.layout import Layout
from pipeline.transformer.model import INIT_STD, Transformer
from pipeline.transformer.norms import build_norm


def digit_sizes(codes: int, groups: int) -> tuple[int, ...]:
    """`groups` numbers, as equal as they can be, whose product is `codes`; the highest digit first.

    Raises:
        UserError: `codes` has no such divisors.
    """
    sizes: list[int] = []
    left = codes
    for remaining in range(groups, 1, -1):
        even = left ** (1 / remaining)
        divisors = [divisor for divisor in range(1, int(4 * even) + 1) if left % divisor == 0]
        sizes.append(min(divisors, key=lambda d: abs(math.log(d / even))))
        left //= sizes[-1]
    sizes.append(left)
    if min(sizes) < 2 or max(sizes) > 8 * min(sizes):
        raise UserError(
            f"transformer.code_groups: expected codes that are {groups} factors of about {codes ** (1 / groups):.0f},"
            f" found {codes:,}: take another number of groups, or a codebook of 2 ** bits"
        )
    return tuple(sorted(sizes, reverse=True))


def ids_of(layout: Layout, groups: int) -> Layout:
    """Whose ids are the rows of embedding and head: as if a level had a code for each value of each digit.

    Raises:
        UserError: the codes of a level have no such digits.
    """
    if groups == 1:
        return layout
    levels = [
        Level(level.height, level.width, sum(digit_sizes(level.codebook_size, groups))) for level in layout.levels
    ]
    return Layout.of(layout.text_length, layout.text_vocab_size, levels)


class GroupedTransformer(Transformer):
    """The raster decoder with `code_groups` digits a code.

    Raises:
        UserError: the codes of a level have no such digits.
    """

    grouped = True

    def __init__(self, layout: Layout, shape: TransformerShape) -> None:
        self.sizes = [digit_sizes(level.codebook_size, shape.code_groups) for level in layout.levels]
        super().__init__(layout, shape)
        width = shape.width
        rows = sum(sum(sizes[:-1]) for sizes in self.sizes)  # nothing is predicted given the last digit
        self.given = nn.Embedding(rows, width)
        self.given_norm = build_norm(shape)
        self.given_in, self.given_out = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        for module in (self.given, self.given_in):
            nn.init.normal_(module.weight, std=INIT_STD)
        with torch.no_grad():
            self.given_in.weight.mul_(shape.width_ratio**0.5)  # as the blocks' matrices
        nn.init.zeros_(self.given_out.weight)

    def _ids_of(self, layout: Layout) -> Layout:
        return ids_of(layout, self.shape.code_groups)

    def parameter_groups(self) -> list[ParameterGroup]:
        [first, *rest] = super().parameter_groups()
        undecayed = [*first.undecayed, self.given.get_parameter("weight")]
        return [ParameterGroup(first.parameters, first.learning_rate_scale, undecayed=undecayed), *rest]

    def _scaled_parameters(self) -> Iterable[Tensor]:
        return (*super()._scaled_parameters(), self.given_in.weight, self.given_out.weight)

    def digits(self, codes_Bn: Tensor, level: int) -> list[Tensor]:
        """Each digit [B, n] of a level's codes, the highest first."""
        found = []
        for size in reversed(self.sizes[level]):
            found.append(codes_Bn % size)
            codes_Bn = codes_Bn // size
        return found[::-1]

    def code_of(self, digits: list[Tensor], level: int) -> Tensor:
        """The inverse of `digits`."""
        code = torch.zeros_like(digits[0])
        for digit, size in zip(digits, self.sizes[level], strict=True):
            code = code * size + digit
        return code

    def targets(self, codes_BN: Tensor) -> list[Tensor]:
        levels = codes_BN.split([level.positions for level in self.layout.levels], dim=1)
        return [digit for level, codes_Bn in enumerate(levels) for digit in self.digits(codes_Bn, level)]

    def hidden_and_head_weights(
        self, text_BT: Tensor, codes_BN: Tensor, targets_BN: Tensor | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        """As the raster model's, with one for each digit of each level, given the digits before it of the same code.

        targets_BN: the codes to predict, where others are read in place of some of them (`code_noise`).
        """
        text, *levels = super().hidden_and_head_weights(text_BT, codes_BN)
        parts, digits = [text], self.targets(codes_BN if targets_BN is None else targets_BN)
        for level, (hidden_BnD, weight) in enumerate(levels):
            own = digits[level * self.shape.code_groups :]
            for digit, rows in enumerate(weight.split(self.sizes[level])):
                parts.append((self.given_digits(hidden_BnD, own[:digit], level), rows))
        return parts

    def given_digits(self, hidden: Tensor, digits: list[Tensor], level: int) -> Tensor:
        """What predicts the digit after `digits` [...] of a code of `level`, from its hidden state [..., D]."""
        if not digits:
            return hidden
        start = sum(sum(sizes[:-1]) for sizes in self.sizes[:level])
        seen = hidden
        for digit, size in zip(digits, self.sizes[level], strict=False):
            seen = seen + self.given(digit + start)
            start += size
        out: Tensor = hidden + self.given_out(F.gelu(self.given_in(self.given_norm(seen))))
        return out

    def digit_logits(self, hidden: Tensor, digits: list[Tensor], level: int) -> Tensor:
        """Logits of the digit after `digits`: [..., D] -> [..., d]."""
        first = self.ids.level_offsets[level] + sum(self.sizes[level][: len(digits)])
        rows = self.head.weight[first : first + self.sizes[level][len(digits)]]
        return self.given_digits(hidden, digits, level) @ rows.T

    def _embed_codes(self, codes_Bn: Tensor, start: int = 0) -> Tensor:
        end = start + codes_Bn.shape[1]
        parts: list[Tensor] = []
        for level, (begin, size) in enumerate(self._parts):
            low, high = max(start, begin), min(end, begin + size)
            if low >= high:
                continue
            digits = self.digits(codes_Bn[:, low - start : high - start], level)
            firsts = accumulate(self.sizes[level], initial=self.ids.level_offsets[level])
            parts.append(sum(self.embedding(digit + first) for digit, first in zip(digits, firsts, strict=False)))
        embedded = torch.cat(parts, dim=1)
        return embedded + self._code_positions(start, end) if len(self.rows) else embedded


def of_codes(losses: Losses, groups: int) -> Losses:
    """Of codes, from those of their digits: what is minimised and the cross-entropy are sums over a code's digits."""
    if groups == 1:
        return losses
    plain = [torch.stack(losses.plain[i : i + groups]).sum(0) for i in range(0, len(losses.plain), groups)]
    right = [torch.stack(losses.right[i : i + groups]).all(0) for i in range(0, len(losses.right), groups)]
    return Losses(losses.mean * groups, plain, right)
