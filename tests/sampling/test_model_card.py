"""Promises of an export's model card: it tells of the weights that lie beside it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pipeline.sampling.model_card import model_card
from pipeline.sampling.model_source import find_models


@pytest.mark.parametrize(
    ("order", "told"),
    [("raster", "does not know what stays below it"), ("any", "in any order")],
)
def test_the_card_says_how_the_order_of_its_model_draws_codes(
    order: str, told: str, tiny_run: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(tiny_run, tmp_path / "tiny"))
    config = run / "config.yaml"
    found = config.read_text()
    assert "order: raster" in found
    config.write_text(found.replace("order: raster", f"order: {order}"))
    limits = model_card(run, find_models(tiny_run), has_grid=False).partition("## Limits")[2]
    assert told in limits
    assert ("raster" in limits) == (order == "raster")


def test_the_card_has_the_losses_of_the_best_step_where_its_weights_are_the_model(
    tiny_run: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(tiny_run, tmp_path / "tiny"))
    with open(run / "transformer" / "metrics.jsonl", "a") as file:
        for step, loss in ((900, 1.25), (950, 4.5)):
            file.write(json.dumps({"step": step, "time": 0.0, "val/loss/image": loss, "best/step": 900}) + "\n")
    card = model_card(run, find_models(tiny_run), has_grid=False)
    assert "| transformer | 900 | val/loss/image | 1.25 |" in card
    assert "4.5 |" not in card
