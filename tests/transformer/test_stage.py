"""The stage `transformer` through the command line, in another style than the demo's."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pipeline.config.transformer import TransformerConfig
from pipeline.transformer.layout import Layout
from pipeline.transformer.model import Transformer
from pipeline.transformer.objective import JointObjective
from stages.transformer import Workload
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


@torch.no_grad()
def test_evaluation_in_micro_batches_finds_the_same_metrics() -> None:
    layout = Layout.of(3, 20, [(2, 2, 8)])
    torch.manual_seed(0)
    validation = {"text": torch.randint(0, 20, (16, 3)), "codes": torch.randint(0, 8, (16, 4))}
    sizes: list[int] = []

    class Validation:
        def __len__(self) -> int:
            return 11  # the second batch is filled up

        def batches(self, consumed: int, size: int) -> Iterator[dict[str, Tensor]]:
            yield from ({name: x[i : i + size] for name, x in validation.items()} for i in (0, size))

    def evaluated(micro: int | None) -> dict[str, float]:
        training = {"steps": 1000, "batch_size": 8, "micro_batch_size": micro}
        workload = object.__new__(Workload)
        workload.config = TransformerConfig.model_validate({"layers": 1, "width": 16, "heads": 2, "training": training})
        torch.manual_seed(1)
        workload.objective = JointObjective(Transformer(layout, workload.config), workload.config).eval()
        nn.init.normal_(workload.objective.transformer.head.weight)
        workload.validation = Validation()  # type: ignore[assignment]  # no arrays on disk
        workload.validation_batches = 2
        workload.objective.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0]["text"])))
        return workload.evaluate(workload.objective)

    whole = evaluated(None)
    assert evaluated(2) == pytest.approx(whole, rel=1e-5)
    assert sizes == [8] * 2 + [2] * 8
