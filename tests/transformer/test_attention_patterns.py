"""Promises of pipeline/transformer/attention_patterns.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline.config.transformer import TransformerShape
from pipeline.transformer.attention_patterns import Pattern, dense_mask, pattern_of
from pipeline.transformer.layout import Layout

# Figure 11 of Ramesh et al. 2021: 4 x 4 codes (the part of the mask where codes see codes; (a), (b) and (d) there).
IMAGES: dict[str, str] = {
    "row": """
        X . . .  . . . .  . . . .  . . . .
        X X . .  . . . .  . . . .  . . . .
        X X X .  . . . .  . . . .  . . . .
        X X X X  . . . .  . . . .  . . . .
        X X X X  X . . .  . . . .  . . . .
        . X X X  X X . .  . . . .  . . . .
        . . X X  X X X .  . . . .  . . . .
        . . . X  X X X X  . . . .  . . . .
        . . . .  X X X X  X . . .  . . . .
        . . . .  . X X X  X X . .  . . . .
        . . . .  . . X X  X X X .  . . . .
        . . . .  . . . X  X X X X  . . . .
        . . . .  . . . .  X X X X  X . . .
        . . . .  . . . .  . X X X  X X . .
        . . . .  . . . .  . . X X  X X X .
        . . . .  . . . .  . . . X  X X X X""",
    "column": """
        X . . .  . . . .  . . . .  . . . .
        . X . .  . . . .  . . . .  . . . .
        . . X .  . . . .  . . . .  . . . .
        . . . X  . . . .  . . . .  . . . .
        X . . .  X . . .  . . . .  . . . .
        . X . .  . X . .  . . . .  . . . .
        . . X .  . . X .  . . . .  . . . .
        . . . X  . . . X  . . . .  . . . .
        X . . .  X . . .  X . . .  . . . .
        . X . .  . X . .  . X . .  . . . .
        . . X .  . . X .  . . X .  . . . .
        . . . X  . . . X  . . . X  . . . .
        X . . .  X . . .  X . . .  X . . .
        . X . .  . X . .  . X . .  . X . .
        . . X .  . . X .  . . X .  . . X .
        . . . X  . . . X  . . . X  . . . X""",
    "convolution": """
        X . . .  . . . .  . . . .  . . . .
        X X . .  . . . .  . . . .  . . . .
        . X X .  . . . .  . . . .  . . . .
        X . X X  . . . .  . . . .  . . . .
        X X . X  X . . .  . . . .  . . . .
        X X X .  X X . .  . . . .  . . . .
        . X X X  . X X .  . . . .  . . . .
        . . X X  X . X X  . . . .  . . . .
        . . . X  X X . X  X . . .  . . . .
        . . . .  X X X .  X X . .  . . . .
        . . . .  . X X X  . X X .  . . . .
        . . . .  . . X X  X . X X  . . . .
        . . . .  . . . X  X X . X  X . . .
        . . . .  . . . .  X X X .  X X . .
        . . . .  . . . .  . X X X  . X X .
        . . . .  . . . .  . . X X  X . X X""",
}
TEXT = 6
FIGURE = Layout.of(TEXT, 40, [(4, 4, 16)])
TWO_LEVELS = Layout.of(3, 40, [(2, 2, 8), (4, 4, 16)])
SPARSE: list[Pattern] = ["row", "column", "convolution"]


def drawn(pattern: str) -> Tensor:
    """The image of codes as bool [16, 16]."""
    rows = [line.split() for line in IMAGES[pattern].strip().splitlines()]
    return torch.tensor([[cell == "X" for cell in row] for row in rows])


def expected_mask(pattern: str, layout: Layout) -> Tensor:
    """Causal text and coarser levels, all of which later parts see, then the paper's image; without the last code."""
    mask = torch.ones(layout.length + 1, layout.length + 1, dtype=torch.bool).tril()
    if pattern != "full":
        mask[-16:, -16:] = drawn(pattern)
        if len(layout.levels) == 2:  # the coarse level is 2 x 2
            a, b, c, d = (layout.text_length + 1 + i for i in range(4))
            unseen = {"row": [(d, a)], "column": [(b, a), (c, b), (d, a), (d, c)], "convolution": []}[pattern]
            for query, key in unseen:
                mask[query, key] = False
    return mask[:-1, :-1]


@pytest.mark.parametrize("layout", [FIGURE, TWO_LEVELS])
@pytest.mark.parametrize("pattern", ["full", *SPARSE])
def test_each_pattern_is_the_papers_image(pattern: Pattern, layout: Layout) -> None:
    assert torch.equal(dense_mask(pattern, layout, 3, torch.device("cpu")), expected_mask(pattern, layout))


def test_the_convolution_wraps_around_and_looks_half_a_kernel_back() -> None:
    mask = dense_mask("convolution", Layout.of(1, 4, [(16, 16, 4)]), 5, torch.device("cpu"))[2:, 2:]
    row, column = 8, 1
    seen = [divmod(int(key), 16) for key in mask[row * 16 + column].nonzero()[:, 0]]
    above = [(r, c) for r in (6, 7) for c in (0, 1, 2, 3)]
    wrapped = [(5, 15), (6, 15), (7, 15)]  # the neighbours to the left of column 0 lie in the row before
    assert sorted(seen) == sorted([*above, *wrapped, (8, 0), (8, 1)])


def test_layers_come_in_the_papers_order() -> None:
    shape = TransformerShape(layers=10, style="classic")
    order = [pattern_of(layer, shape) for layer in range(10)]
    assert order == ["row", "column", "row", "row", "row", "column", "row", "row", "row", "convolution"]
    assert {pattern_of(layer, TransformerShape(layers=10)) for layer in range(10)} == {"full"}
