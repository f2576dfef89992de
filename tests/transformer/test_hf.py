"""Promises of pipeline/transformer/hf.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel

import pipeline.transformer.hf
from pipeline.transformer.model import Transformer
from tests.transformer.test_model import LAYOUTS, batch, built


@pytest.mark.parametrize("shape", [{}, {"style": "classic"}, {"style": "modern", "kv_heads": 2}], ids=str)
def test_auto_model_loads_the_exported_folder_without_remote_code(tmp_path: Path, shape: dict[str, object]) -> None:
    layout = LAYOUTS[1]
    model = built(layout, **shape)
    model.save_pretrained(tmp_path / "exported")
    assert isinstance(AutoConfig.from_pretrained(tmp_path / "exported"), pipeline.transformer.hf.SmaltiConfig)
    loaded = AutoModel.from_pretrained(tmp_path / "exported")
    loaded.save_pretrained(tmp_path / "again")
    again = Transformer.from_pretrained(tmp_path / "again")
    with torch.no_grad():
        expected = model(*batch(layout))[1]
        for one, other, third in zip(expected, loaded(*batch(layout))[1], again(*batch(layout))[1], strict=True):
            assert torch.equal(one, other)
            assert torch.equal(one, third)
