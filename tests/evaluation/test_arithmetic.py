"""What people are shown is computed in float32 on GPUs, too, where torch's convolutions use TF32 unless told not to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from pipeline.cli.main import cli
from pipeline.config.pipeline import load_pipeline
from pipeline.image_tokenizer.base import build
from pipeline.sampling.image_prompt import ImagePrompt
from pipeline.sampling.pipeline import Pipeline
from stages import evaluate
from tests.report.test_report import again, changed


@pytest.fixture
def in_tf32(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Of each convolution that is computed, whether a GPU would do so in TF32."""
    found: list[bool] = []

    def look(module: nn.Module, *_: object) -> None:
        if isinstance(module, nn.Conv2d):
            found.append(torch.backends.cudnn.allow_tf32)

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # torch's default
    hook = register_module_forward_hook(look)
    yield found
    hook.remove()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
    return tmp_path / "images"


def run(*arguments: object) -> None:
    done = CliRunner().invoke(cli, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output


def test_smalti_evaluate_takes_features_without_tf32(images: Path, tmp_path: Path, in_tf32: list[bool]) -> None:
    run("evaluate", "--real", images, "--fake", images, "--cache", tmp_path / "cache")
    assert set(in_tf32) == {False}


def test_smalti_reconstruct_has_the_codes_that_tokenize_writes(
    images: Path, tmp_path: Path, in_tf32: list[bool]
) -> None:
    small = {"kind": "dvae", "codebook_size": 32, "code_width": 8, "patch_size": 2, "widths": (16, 32), "blocks": 1}
    build(small, image_size=16).save_pretrained(tmp_path / "tokenizer")
    run("reconstruct", tmp_path / "tokenizer", images, "-o", tmp_path / "sheets")
    assert set(in_tf32) == {False}


def test_the_stage_evaluate_measures_the_codes_that_tokenize_writes(
    tiny_run: Path, tmp_path: Path, in_tf32: list[bool]
) -> None:
    config = changed(load_pipeline(tiny_run / "config.yaml"), feature_cache=tmp_path / "cache", bootstraps=2)
    evaluate.main(again(tiny_run, tmp_path, config, "evaluate"))
    assert set(in_tf32) == {False}


def test_an_image_prompt_has_the_codes_that_tokenize_writes(tiny_run: Path, in_tf32: list[bool]) -> None:
    pipeline = Pipeline.from_pretrained(tiny_run)
    size = pipeline.image_tokenizer.width, pipeline.image_tokenizer.height
    pipeline.generate(["joker"], image_prompt=ImagePrompt(Image.new("RGB", size), keep_rows=1))
    assert in_tf32[0] is False  # of the encoder, which comes first
