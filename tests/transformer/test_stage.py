"""The stage `transformer` through the command line, in another style than the demo's."""

from __future__ import annotations

import shutil
from pathlib import Path

from pipeline.transformer.model import Transformer
from tests.conftest import TINY
from tests.launch import launch


def test_a_modern_transformer_with_bpe_dropout_trains_evaluates_and_generates(tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "tiny"
    shutil.copytree(
        tiny_run, run, ignore=shutil.ignore_patterns("mlflow.db", "mlartifacts", "generate", "evaluate", "report")
    )
    changed = ["style=modern", "kv_heads=1", "bpe_dropout=0.1", "z_loss=1e-4", "training.steps=6"]
    overrides = [f"transformer.{key}" for key in changed]
    launch("pipeline", "transformer", "--config", str(TINY), *overrides, "tracking.enabled=false", cwd=tmp_path)
    model = Transformer.from_pretrained(run / "transformer" / "model")
    assert (model.shape.positions, model.shape.kv_heads) == ("rotary", 1)
    metrics = (run / "transformer" / "metrics.jsonl").read_text()
    assert "val/bits/image_token" in metrics
    assert (run / "transformer" / "images" / "loss_by_position-00000006.png").is_file()
    assert (run / "transformer" / "samples.png").is_file()
