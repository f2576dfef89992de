"""`training.seed`: one stage trains again with other random numbers, on the same data and the same other models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import NO_TRACKING, TINY
from tests.launch import launch

TRAINED = ("image_tokenizer", "transformer")


def _weights(run: Path, section: str) -> str:
    manifest = json.loads((run / section.replace("_", "-") / "manifest.json").read_text())
    found: str = manifest["outputs"]["model/model.safetensors"]["sha256"]
    return found


@pytest.mark.parametrize("section", TRAINED)
def test_a_stage_of_another_seed_trains_again_to_other_weights_and_that_of_the_runs_to_the_same(
    section: str, tiny_run: Path, tmp_path: Path
) -> None:
    stage = section.replace("_", "-")
    shutil.copytree(tiny_run, tmp_path / "tiny")
    weights = []
    for seed in (1, 0):  # 0 is the run's
        seeded = [f"{section}.training.seed={seed}", f"runs={tmp_path}", NO_TRACKING]
        told = launch("pipeline", "run", str(TINY), "--only", stage, *seeded)
        assert f"{section}.training.seed: " in told
        weights.append(_weights(tmp_path / "tiny", section))
    assert weights[0] != weights[1] == _weights(tiny_run, section)
