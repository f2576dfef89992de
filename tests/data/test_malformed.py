"""Malformed sources end no stage by a traceback and lose nothing uncounted. Many more: `tests/data/malformed.py`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.malformed import broken_promise


@pytest.mark.parametrize("first", range(0, 60, 20))
def test_malformed_sources_break_no_promise(tmp_path: Path, first: int) -> None:
    pytest.importorskip("pyarrow")
    for seed in range(first, first + 20):
        assert not broken_promise(seed, tmp_path / str(seed)), f"seed {seed}"
