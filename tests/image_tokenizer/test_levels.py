"""Promises of tokenizers with several levels: their codes go through every stage, and a kill changes no bit."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from PIL import Image

from pipeline.image_tokenizer import ImageTokenizer
from tests.conftest import TINY
from tests.launch import ROOT, command, environment, launch

# Two grids, the coarse one in three scales: four levels, 1×1, 3×3, 4×4 and 8×8.
MODEL = (
    "image_tokenizer.model={kind: vqvae2, patch_size: 2, widths: [32, 32], blocks: 1, block_kernels: [3, 1],"
    " quantizers: [{kind: multiscale, scales: [1, 3, 4], codebook: {kind: ema, codebook_size: 64, code_width: 8}},"
    " {kind: gradient, codebook_size: 32, code_width: 8}]}"
)
LEVELS = [MODEL, "tracking.enabled=false"]  # each new run would wait for a database of MLflow's


def _prepared(tiny_run: Path, folder: Path) -> Path:
    run = folder / "tiny"
    run.mkdir(parents=True)
    for name in ("run.json", "config.yaml"):
        shutil.copy(tiny_run / name, run)
    for stage in ("prepare", "text-tokenizer"):
        shutil.copytree(tiny_run / stage, run / stage)
    return run


@pytest.fixture(scope="module")
def levels_run(tmp_path_factory: pytest.TempPathFactory, tiny_run: Path) -> Path:
    """The tiny pipeline up to `generate`, with four levels of codes."""
    run = _prepared(tiny_run, tmp_path_factory.mktemp("levels"))
    overrides = [*LEVELS, "image_tokenizer.usage_floor=1", "transformer.training.steps=6", "generate.samples=4"]
    for stage in ("image_tokenizer", "tokenize", "transformer", "generate"):
        launch(f"stages.{stage}", "--config", str(TINY), f"runs={run.parent}", *overrides)
    return run


def test_levels_flow_from_the_tokenizer_to_generated_images(levels_run: Path) -> None:
    tokenizer = ImageTokenizer.from_pretrained(levels_run / "image-tokenizer" / "model")
    assert [tuple(level) for level in tokenizer.levels] == [(1, 1, 64), (3, 3, 64), (4, 4, 64), (8, 8, 32)]
    index = json.loads((levels_run / "tokenize" / "index.json").read_text())
    assert [tuple(level.values()) for level in index["levels"]] == [tuple(level) for level in tokenizer.levels]
    [layout] = [
        json.loads(path.read_text())["layout"] for path in (levels_run / "transformer").glob("model/config.json")
    ]
    assert [tuple(level.values()) for level in layout["levels"]] == [tuple(level) for level in tokenizer.levels]
    prompts = json.loads((levels_run / "generate" / "prompts.json").read_text())
    assert Image.open(levels_run / "generate" / prompts[0]["file"]).size == (16, 16)
    lines = [json.loads(line) for line in (levels_run / "image-tokenizer" / "metrics.jsonl").read_text().splitlines()]
    metrics = [line for line in lines if "val/psnr" in line][-1]
    assert {f"val/codebook_usage_{level}" for level in range(4)} <= metrics.keys()
    assert list((levels_run / "image-tokenizer" / "images").glob("codebook-usage-*.png"))


def test_a_level_below_the_usage_floor_is_told_in_the_log(levels_run: Path) -> None:
    log = (levels_run / "logs" / "image-tokenizer.log").read_text()
    assert "codebook collapse: expected at least 100% of the codes in use" in log
    assert "raise dead_code_threshold" in log


def test_killed_and_resumed_codebooks_end_with_the_same_bits(levels_run: Path, tiny_run: Path, tmp_path: Path) -> None:
    run = _prepared(tiny_run, tmp_path)
    arguments = ["--config", str(TINY), f"runs={tmp_path}", *LEVELS]
    process = subprocess.Popen(
        command("stages.image_tokenizer", arguments), env=environment(), cwd=ROOT, stderr=subprocess.DEVNULL
    )
    checkpoints = run / "image-tokenizer" / "checkpoints"
    deadline = time.monotonic() + 120
    while not list(checkpoints.glob("step-*0")):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline, "no checkpoint came"
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert "resuming from step" in launch("stages.image_tokenizer", *arguments)
    weights = "image-tokenizer/model/model.safetensors"
    assert (run / weights).read_bytes() == (levels_run / weights).read_bytes()
