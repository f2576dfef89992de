"""The stage tune on a real run: killed anywhere it ends with the same bits, and what comes after uses its model."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch
from PIL import Image

from pipeline.config.pipeline import load_pipeline
from pipeline.config.transformer import TransformerShape
from pipeline.core.metric_names import CLOCK_METRICS
from pipeline.image_tokenizer.base import build
from pipeline.orchestration.graph import inputs_of, stage_named
from pipeline.orchestration.run_directory import RunDirectory
from pipeline.orchestration.stage_run import StageRun
from pipeline.orchestration.tracking import Tracker
from pipeline.sampling.model_source import find_models
from pipeline.sampling.pipeline import Pipeline
from pipeline.transformer.build import build_transformer, load_transformer
from pipeline.transformer.layout import Layout
from stages.tune import Workload
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


def test_sample_images_are_those_of_the_weights_as_they_are(tmp_path: Path, tiny_run: Path) -> None:
    run = RunDirectory(_begun(tiny_run, tmp_path))
    _put_untrained_levels(run)
    clip = save_clip(tmp_path / "clip", ["joker"])
    config = load_pipeline(run.path, ["tune.enabled=true", "tune.reward=clip", f"tune.clip={clip}", TRAINING])
    tune = Workload(StageRun(config, stage_named("tune"), run, Tracker(run.stage("tune"), None)))
    for parameter, values in tune.initial.draw(tune.objective):
        parameter.data = values
    start, tuned = _halves(tune.sample_images(tune.objective, in_step=False)["samples"])
    tune.objective.transformer.head.weight.data.mul_(-1)  # as ZeRO and averages write: torch counts no version
    now = _halves(tune.sample_images(tune.objective, in_step=False)["samples"])
    assert now[0] == start
    assert now[1] != tuned


def _put_untrained_levels(run: RunDirectory) -> None:
    """In place of the run's models, a tokenizer of levels and a transformer of them, whose weights CPUs pack."""
    quantizer = {"kind": "multiscale", "scales": [1, 2, 4], "codebook": {"kind": "ema", "codebook_size": 16}}
    torch.manual_seed(0)
    tokenizer = build({"kind": "vqvae", "patch_size": 4, "widths": [8], "blocks": 1, "quantizer": quantizer}, 16)
    tokenizer.save_pretrained(run.stage("image-tokenizer") / "model")
    folder = run.stage("transformer") / "model"
    text = load_transformer(folder).layout
    shape = TransformerShape.model_validate({"layers": 2, "width": 64, "heads": 2, "order": "scale"})
    model = build_transformer(Layout.of(text.text_length, text.text_vocab_size, tokenizer.levels), shape)
    torch.nn.init.normal_(model.head.weight)
    model.save_pretrained(folder)


def _halves(page: Image.Image) -> list[bytes]:
    """The pixels of the start's images, and those of the tuned model's."""
    half = page.height // 2
    return [page.crop((0, top, page.width, top + half)).tobytes() for top in (0, half)]
