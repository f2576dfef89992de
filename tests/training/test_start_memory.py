"""What a process takes of the host's memory while a training starts, in the stage as it is run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from pipeline.config.pipeline import load_pipeline
from pipeline.training.gpu_plan import memory
from pipeline.training.host_plan import host_memory
from pipeline.training.resource_plan import FLOAT32, count
from tests.conftest import NO_TRACKING
from tests.launch import launch
from tests.training.test_resume import BEFORE_THE_TRANSFORMER

SETTINGS = ["transformer.layers=4", "transformer.width=2048", "transformer.heads=16"]  # 203 M parameters
SETTINGS += ["transformer.deepspeed.zero_stage=3", "transformer.training.batch_size=4"]
SETTINGS += ["transformer.training.precision=bf16-weights"]


def test_at_zero_3_a_start_takes_at_most_a_fifth_more_than_its_share_and_two_parameters_nor_more_than_planned(
    tiny_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "tiny"
    for name in BEFORE_THE_TRANSFORMER:
        shutil.copytree(tiny_run / name, run / name)
    for name in ("run.json", "config.yaml"):
        shutil.copy(tiny_run / name, run)
    arguments = ["--config", str(run / "config.yaml"), *SETTINGS, NO_TRACKING]
    launch("tests.training.start_memory_worker", *arguments, processes=2, START_MEMORY=str(tmp_path))
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    config = load_pipeline(run / "config.yaml", SETTINGS)
    section, model = config.transformer, count(config, 2, "cpu")
    assert [of_rank["parameters"] for of_rank in found] == [model.parameters] * 2
    share = (2 * model.weight_bytes + FLOAT32) * model.parameters / 2  # both weights, gradients; moments come later
    planned = memory(model, section.training, section.deepspeed, 3, 2).start
    planned += host_memory(model, section.training, section.deepspeed, 3, gpus=2, per_node=1).start
    for of_rank in found:
        assert of_rank["peak"] <= 1.2 * share + 2 * FLOAT32 * of_rank["largest"]
        assert of_rank["peak"] <= 1.07 * planned
