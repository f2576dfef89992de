"""The stage tune on a real run: killed anywhere it ends with the same bits, and what comes after uses its model."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from pipeline.config.pipeline import load_pipeline
from pipeline.core.metric_names import CLOCK_METRICS
from pipeline.orchestration.graph import inputs_of, stage_named
from pipeline.sampling.model_source import find_models
from pipeline.sampling.pipeline import Pipeline
from tests.conftest import NO_TRACKING
from tests.extractors.tiny_clip import save_clip
from tests.launch import ROOT, command, environment, kill_all, launch

TRAINING = "tune.training={steps: 8, batch_size: 16, learning_rate: 0.001, warmup_steps: 0, log_every: 1, "
TRAINING += "evaluate_every: 4, evaluate_batches: 1, log_images_every: 8, checkpoint_every: 2}"


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    clip = save_clip(tmp_path_factory.mktemp("clip"), ["joker", "red", "flag"])
    tune = ["tune.enabled=true", "tune.reward=clip", f"tune.clip={clip}", "tune.group_size=4", TRAINING]
    return [*tune, NO_TRACKING]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory, tiny_run: Path, overrides: list[str]) -> Path:
    """The tiny run, tuned by the scores of a CLIP."""
    run = _begun(tiny_run, tmp_path_factory.mktemp("tuned"))
    launch("pipeline", "run", str(run), *overrides, "--only", "tune")
    return run


def _begun(tiny_run: Path, folder: Path) -> Path:
    left_out = shutil.ignore_patterns("generate", "evaluate", "report", "mlflow*", "mlartifacts")
    return Path(shutil.copytree(tiny_run, folder / "tiny", ignore=left_out))


def _metrics(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "tune" / "metrics.jsonl").read_text().splitlines()]
    clock = ("time", "system/", *CLOCK_METRICS)
    return [{name: value for name, value in line.items() if not name.startswith(clock)} for line in lines]


def _outputs(run: Path) -> dict[str, str]:
    manifest = json.loads((run / "tune" / "manifest.json").read_text())
    return {name: entry["sha256"] for name, entry in manifest["outputs"].items()}


def test_killed_after_a_checkpoint_tuning_ends_with_the_same_bits(
    tmp_path: Path, tiny_run: Path, tuned: Path, overrides: list[str]
) -> None:
    run = _begun(tiny_run, tmp_path)
    arguments = ["--config", str(run / "config.yaml"), *overrides]
    process = subprocess.Popen(
        command("stages.tune", arguments), env=environment(), cwd=ROOT, stderr=subprocess.DEVNULL
    )
    while not (run / "tune" / "checkpoints" / "step-00000004").exists():
        assert process.poll() is None
        time.sleep(0.01)
    kill_all([psutil.Process(process.pid)])
    process.wait()
    assert "resuming from step" in launch("stages.tune", *arguments)
    assert _outputs(run) == _outputs(tuned)
    assert _metrics(run) == _metrics(tuned)


def test_tuning_logs_reward_and_divergence_which_begins_at_none(tuned: Path) -> None:
    lines = _metrics(tuned)
    trained = [line for line in lines if "kl" in line]
    assert trained[0]["kl"] == pytest.approx(0, abs=1e-4)
    assert trained[-1]["kl"] > 1e-4
    assert all("reward" in line and "groups_that_differ" in line for line in trained)
    assert [line["step"] for line in lines if "val/reward" in line] == [4, 8]
    assert (tuned / "tune" / "samples.png").is_file()


def test_what_comes_after_and_a_pipeline_of_the_run_use_the_tuned_model(tuned: Path, tiny_run: Path) -> None:
    found = find_models(tuned)
    assert found.transformer == tuned / "tune" / "model"
    metadata = Pipeline.from_pretrained(tuned).source.model_hash
    assert metadata == found.model_hash != find_models(tiny_run).model_hash
    for name in ("generate", "evaluate"):
        assert "tune" in inputs_of(load_pipeline(tuned), stage_named(name))
        assert "tune" not in inputs_of(load_pipeline(tiny_run), stage_named(name))
    assert find_models(tuned, step=30).transformer == tuned / "transformer" / "exported" / "step-00000030"
