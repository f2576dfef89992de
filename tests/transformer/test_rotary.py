"""Promises of pipeline/transformer/rotary.py."""

from __future__ import annotations

import torch

from pipeline.transformer.layout import Layout
from pipeline.transformer.rotary import RotaryTable, cosine_sine, rotary_angles, rotate

TWO_LEVELS = Layout.of(3, 40, [(2, 2, 8), (4, 4, 16)])


def test_rotary_positions_are_the_index_for_text_and_row_and_column_for_codes() -> None:
    angles = rotary_angles(TWO_LEVELS, 8, torch.device("cpu"))  # 2 pairs by row, 2 by column; the first turns by 1
    rows, columns = angles[:, 0].tolist(), angles[:, 2].tolist()
    assert rows[:4] == columns[:4] == [0, 1, 2, 3]  # start and text
    coarse, fine = slice(4, 8), slice(8, None)
    assert rows[coarse] == [4.5, 4.5, 6.5, 6.5]
    assert columns[coarse] == [4.5, 6.5, 4.5, 6.5]
    assert rows[fine] == [4.0 + i // 4 for i in range(15)]
    assert columns[fine] == [4.0 + i % 4 for i in range(15)]


def test_one_position_turned_in_place_is_that_of_all_turned_at_once() -> None:
    angles = rotary_angles(TWO_LEVELS, 8, torch.device("cpu"))
    torch.manual_seed(0)
    x = torch.randn(2, TWO_LEVELS.length, 3, 8)
    expected = rotate(x, *cosine_sine(angles, torch.float32))
    table = RotaryTable.from_angles(angles, torch.float32)
    for position in range(TWO_LEVELS.length):
        own = x[:, position].clone()
        table.apply_(own, position)
        torch.testing.assert_close(own, expected[:, position])
