"""Trainings of order any and scale resume as those of raster models do: with the same bits after kill -9, and on fewer
processes."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.conftest import NO_TRACKING
from tests.launch import launch


def test_killed_trainings_of_order_any_and_scale_end_with_the_same_bits(tiny_run: Path, tmp_path: Path) -> None:
    told = launch("tests.training.killed_orders_worker", str(tiny_run), str(tmp_path))
    for order in ("any", "scale"):  # order any with its anneal under way
        found = re.search(rf"^{order}: Report\(kills=2, ends=[1-9]\d*, other_weights=0, .*faults=\[\]\)$", told, re.M)
        assert found, told


def test_order_any_goes_on_with_one_process_where_two_have_stopped(tiny_run: Path, tmp_path: Path) -> None:
    losses = []
    for folder, stretches in (("whole", [(8, 2)]), ("broken", [(4, 2), (8, 1)])):
        run = tmp_path / folder / "tiny"
        run.mkdir(parents=True)
        for name in ("run.json", "config.yaml"):
            shutil.copy(tiny_run / name, run)
        for stage in ("prepare", "text-tokenizer", "image-tokenizer", "tokenize"):
            shutil.copytree(tiny_run / stage, run / stage)
        for steps, processes in stretches:
            training = f"{{steps: {steps}, batch_size: 16, warmup_steps: 0, schedule: constant, log_every: 1}}"
            settings = [f"transformer.training={training}", "transformer.training.precision=fp32", NO_TRACKING]
            settings += ["transformer.order=any", "transformer.order_anneal=[1, 7]", "transformer.caption_dropout=0"]
            launch("stages.transformer", "--config", str(run / "config.yaml"), *settings, processes=processes)
        lines = map(json.loads, (run / "transformer" / "metrics.jsonl").read_text().splitlines())
        losses.append({line["step"]: line["loss/image"] for line in lines if "loss/image" in line})
    assert list(losses[1]) == [*range(1, 9)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
