"""Promises of codebooks and usage terms when several processes share a batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.launch import launch

pytestmark = pytest.mark.slow  # the processes take their time, not the tests


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder: Path = tmp_path_factory.mktemp("codebooks")
    for processes in (1, 2):
        launch("tests.image_tokenizer.codebook_worker", str(folder), processes=processes, MASTER_ADDR="127.0.0.1")
    return {path.stem: torch.load(path) for path in folder.glob("*.pt")}


def test_all_ranks_hold_the_same_codebook_to_the_last_bit(results: dict[str, Any]) -> None:
    first, second = results["2-0"]["parts 1"], results["2-1"]["parts 1"]
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first["started"]
    assert first["ema_counts"].sum() == pytest.approx(160, rel=0.3)  # positions of both ranks


def test_ranks_and_micro_batches_change_no_codebook(results: dict[str, Any]) -> None:
    whole = results["1-0"]["parts 1"]
    for other in (results["1-0"]["parts 4"], results["2-0"]["parts 1"], results["2-0"]["parts 4"]):
        torch.testing.assert_close(other, whole)


def test_ranks_and_micro_batches_change_no_draw_of_a_discrete_vae(results: dict[str, Any]) -> None:
    whole = results["1-0"]["dvae parts 1"]
    for other in (results["1-0"]["dvae parts 4"], results["2-0"]["dvae parts 1"], results["2-1"]["dvae parts 4"]):
        torch.testing.assert_close(other, whole)


def test_usage_term_and_its_gradient_are_those_of_the_whole_batch(results: dict[str, Any]) -> None:
    for rank in (0, 1):
        torch.testing.assert_close(results[f"2-{rank}"]["kl"], results["1-0"]["kl"])
    torch.testing.assert_close(results["2-0"]["gradient"], results["1-0"]["gradient"])


@pytest.mark.parametrize("rank", ["1-0", "2-1"])
def test_averaged_weights_come_with_an_averaged_codebook(results: dict[str, Any], rank: str) -> None:
    found = results[rank]["average"]
    torch.testing.assert_close(found["average"], found["by hand"])
    assert torch.equal(found["swapped in"], found["average"])
    assert not torch.equal(found["average"], found["raw"])
