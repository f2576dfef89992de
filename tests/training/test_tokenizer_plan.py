"""Promises of `smalti plan` about the image tokenizer's memory."""

from __future__ import annotations

import pytest
import torch
from click.testing import CliRunner

from pipeline.cli.plan import plan
from pipeline.config.base import parse_config
from pipeline.config.image_tokenizer import ImageTokenizerConfig
from pipeline.image_tokenizer.base import build
from pipeline.training.live_memory import LiveBytes
from pipeline.training.optimizer import muon_matrices
from pipeline.training.tokenizer_plan import TokenizerMemory, tokenizer_memory
from tests.conftest import TINY

MODEL = {"kind": "vqvae", "widths": [32, 64], "bottleneck": 1, "quantizer": {"kind": "fsq", "channels": [8, 5, 5, 5]}}
TRAINING = {"steps": 10, "batch_size": 4, "warmup_steps": 1, "precision": "fp32", "ema_decay": 0.9}


def planned(size: int, **training: object) -> TokenizerMemory:
    section = {"model": MODEL, "training": TRAINING | training}
    return tokenizer_memory(parse_config(ImageTokenizerConfig, section, "test"), size, gpus=1)


@pytest.mark.slow
def test_planned_memory_of_a_training_step_is_that_of_real_tensors_within_a_tenth() -> None:
    tokenizer = build({**MODEL, "channels_last": False}, 16)
    objective = tokenizer.objective().train()
    live = LiveBytes()
    for tensor in (*objective.parameters(), *objective.buffers()):
        live.know(tensor)
    with live:
        loss, _ = objective({"images": torch.zeros(4, 3, 16, 16, dtype=torch.uint8)}, 0)
        loss.backward()
    held = 4 * 4 * sum(p.numel() for p in objective.parameters())  # weights, two moments, average
    assert abs(planned(16).training / (live.peak + held) - 1) < 0.1


def test_four_times_the_pixels_take_four_times_the_activations_and_recomputed_blocks_less() -> None:
    small, large = planned(256), planned(512)
    assert 3.5 < large.decode / small.decode < 4.5
    assert planned(512, activation_checkpointing="block").training < 0.9 * large.training


def test_muon_keeps_one_state_of_each_kernel_that_it_trains() -> None:
    kernels = sum(matrix.numel() for matrix in muon_matrices(build(MODEL, 16).objective()))
    assert kernels > 10_000
    assert planned(16).training - planned(16, optimizer="muon").training == 4 * kernels


@pytest.mark.slow
def test_plan_tells_the_tokenizers_memory_at_each_size_that_is_asked_for() -> None:
    arguments = [str(TINY), "--gpus", "1", "--image-size", "32", "--image-size", "64"]
    shown = CliRunner().invoke(plan, arguments, catch_exceptions=False).output
    lines = [line for line in shown.splitlines() if line.startswith("images ")]
    assert [line.split(":")[0].split()[-2] for line in lines] == ["32", "64"]
    assert all(word in line for line in lines for word in ("training", "encode", "decode"))
    little = CliRunner().invoke(plan, [*arguments, "--gpu", "X", "--peak-tflops", "1", "--memory-gb", "0.001"]).output
    assert "more than 0.001 GB: training" in little.splitlines()[-1]
