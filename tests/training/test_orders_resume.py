"""Trainings of order any and scale resume as those of raster models do: with the same bits after kill -9."""

from __future__ import annotations

import re
from pathlib import Path

from tests.launch import launch


def test_killed_trainings_of_order_any_and_scale_end_with_the_same_bits(tiny_run: Path, tmp_path: Path) -> None:
    told = launch("tests.training.killed_orders_worker", str(tiny_run), str(tmp_path))
    for order in ("any", "scale"):  # order any with its anneal under way
        found = re.search(rf"^{order}: Report\(kills=2, ends=[1-9]\d*, other_weights=0, .*faults=\[\]\)$", told, re.M)
        assert found, told
