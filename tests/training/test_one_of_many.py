"""A process of a training on many has what it would have among them: `python -m benchmarks.one_of_many`, in small."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.conftest import TINY
from tests.launch import launch


@pytest.mark.slow
def test_a_process_of_16_starts_saves_and_reads_its_bits_again_and_an_export_finds_every_element(
    tmp_path: Path,
) -> None:
    arguments = [str(tmp_path / "of-16"), str(TINY), "transformer.training.ema_decay=0.9", "--processes", "16"]
    told = launch("benchmarks.one_of_many", *arguments)
    assert re.search(r"in 36 files", told), told
    assert "its bits are those that it wrote" in told
    assert re.search(r"export +\d+ tensors", told)
    assert re.findall(r"rank (\d+) +holds what its files say", told) == ["8", "15"]
