"""Sample images while training: every rank generates its part of them, at ZeRO-3 with a model that nobody has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.launch import launch


def _train(zero: int, processes: int, folder: Path) -> list[dict[str, Any]]:
    launch("tests.training.sharded_images_worker", str(zero), str(folder), processes=processes)
    return [torch.load(folder / f"{rank} at {zero}.pt") for rank in range(processes)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return _train(0, 1, tmp_path_factory.mktemp("alone"))[0]


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 3])
def test_ranks_together_generate_the_images_of_one_process(zero: int, alone: dict[str, Any], tmp_path: Path) -> None:
    ranks = _train(zero, 2, tmp_path)
    assert ranks[0]["with images"]["images"] == ranks[1]["with images"]["images"] == alone["with images"]["images"]
    assert len(set(alone["with images"]["images"])) == 2  # the steps in between have changed them
    for found in ranks:  # and images change nothing of the training
        assert found["with images"]["losses"] == found["alone"]["losses"]
        assert found["with images"]["stopped"] is True
