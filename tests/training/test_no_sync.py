"""Between two log lines no step waits for the device: batch, both passes, update, average, counts, in the real loop."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch import launch
from tests.training.no_sync_worker import FIRST_STEPS, STEPS

pytestmark = pytest.mark.slow  # a process that imports torch and an engine


@pytest.mark.parametrize("kind", ["image-tokenizer", "transformer"])
def test_no_step_between_two_log_lines_waits_for_the_device(kind: str, tmp_path: Path) -> None:
    output = launch("tests.training.no_sync_worker", kind, str(tmp_path))
    assert output.count("a step that waited for nothing") == STEPS - FIRST_STEPS


def test_a_step_that_waits_is_found(tmp_path: Path) -> None:
    output = launch("tests.training.no_sync_worker", "image-tokenizer", str(tmp_path), "waits", check=False)
    assert "HostSync: Tensor.tolist" in output
    assert "waited for nothing" not in output
