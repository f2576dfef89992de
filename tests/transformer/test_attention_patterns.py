"""Promises of pipeline/transformer/attention_patterns.py, and of every way of attending."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline.config.transformer import TransformerShape
from pipeline.transformer.attention_patterns import Pattern, Tables, dense_mask, pattern_of, rotary_angles
from pipeline.transformer.blocks import attend, attend_masked, flex
from pipeline.transformer.layout import Layout

# Metric 11 of Ramesh et al. 2021: 4 x 4 codes (the part of the mask where codes see codes; (a), (b) and (d) there).
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
    """The image in its place: causal text and coarser levels, all of which later parts see; without the last code."""
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


@pytest.mark.parametrize("layout", [FIGURE, TWO_LEVELS])
@pytest.mark.parametrize("pattern", ["full", *SPARSE])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_every_way_of_attending_is_a_softmax_over_what_the_image_allows(
    pattern: Pattern, layout: Layout, kv_heads: int
) -> None:
    tables = Tables(layout, TransformerShape(width=64, heads=4, conv_kernel=3), torch.device("cpu"))
    torch.manual_seed(0)
    query = torch.randn(2, 4, layout.length, 16)
    key, value = (torch.randn(2, kv_heads, layout.length, 16) for _ in range(2))
    keys, values = (x.repeat_interleave(4 // kv_heads, dim=1) for x in (key, value))
    scores = (query @ keys.transpose(-1, -2) * 0.3).masked_fill(~expected_mask(pattern, layout), float("-inf"))
    expected = scores.softmax(-1) @ values

    def same(found: Tensor, start: int = 0) -> None:
        torch.testing.assert_close(found, expected[:, :, start : start + found.shape[2]], atol=1e-5, rtol=1e-5)

    same(attend(query.clone().requires_grad_(), key, value, 0.3, pattern, tables).detach())
    same(attend_masked(query, key, value, 0.3, pattern, tables, 0))
    same(flex(query, key, value, 0.3, pattern, tables))
    for start, end in [(i, i + 1) for i in range(layout.length)] + [(4, layout.length), (5, 9)]:
        same(attend(query[:, :, start:end], key[:, :, :end], value[:, :, :end], 0.3, pattern, tables), start)


def test_rotary_places_are_the_index_for_text_and_row_and_column_for_codes() -> None:
    angles = rotary_angles(TWO_LEVELS, 8, torch.device("cpu"))  # 2 pairs by row, 2 by column; the first turns by 1
    rows, columns = angles[:, 0].tolist(), angles[:, 2].tolist()
    assert rows[:4] == columns[:4] == [0, 1, 2, 3]  # start and text
    coarse, fine = slice(4, 8), slice(8, None)
    assert rows[coarse] == [4.5, 4.5, 6.5, 6.5]
    assert columns[coarse] == [4.5, 6.5, 4.5, 6.5]
    assert rows[fine] == [4.0 + i // 4 for i in range(15)]
    assert columns[fine] == [4.0 + i % 4 for i in range(15)]
