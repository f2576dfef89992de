"""Promises of VQ-VAE and VQ-VAE-2: codes, images, saving, learning, and what collapse gets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.config.training import TrainingConfig
from pipeline.core.errors import UserError
from pipeline.image_tokenizer.base import ImageTokenizer, build
from pipeline.image_tokenizer.evaluation import collapsed, evaluate, usage_histogram
from pipeline.training.activation_checkpointing import checkpoint_activations
from pipeline.training.optimizer import build_adamw

SMALL = {"patch_size": 2, "widths": (16, 32), "blocks": 1, "block_kernels": (3, 1), "stem_kernel": 1}
EMA = {"kind": "ema", "codebook_size": 32, "code_width": 8, "commitment_weight": 0.05}
MODELS = {
    "vqvae": {"kind": "vqvae", "quantizer": EMA},
    "residual": {"kind": "vqvae", "quantizer": EMA | {"depth": 2}},
    "fsq": {"kind": "vqvae", "quantizer": {"kind": "fsq", "channels": (4, 4, 3)}},
    "two levels": {"kind": "vqvae2", "quantizers": [EMA, {"kind": "lfq", "bits": 5}]},
    "three levels": {"kind": "vqvae2", "patch_size": 1, "widths": (8, 16, 32), "quantizers": [EMA] * 3},
}
LEVELS = {
    "vqvae": [(4, 4, 32)],
    "residual": [(4, 4, 32)] * 2,
    "fsq": [(4, 4, 48)],
    "two levels": [(4, 4, 32), (8, 8, 32)],
    "three levels": [(4, 4, 32), (8, 8, 32), (16, 16, 32)],
}


def small(name: str, **changes: object) -> ImageTokenizer:
    torch.manual_seed(0)
    return build(SMALL | MODELS[name] | changes, image_size=16).eval()


def shapes(seed: int = 0) -> Tensor:
    """Images with something to learn: one bright square each on a dark ground, uint8 [64,3,16,16]."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.full((64, 3, 16, 16), 40, dtype=torch.uint8)
    for image in images:
        top, left = torch.randint(0, 10, (2,), generator=generator).tolist()
        image[:, top : top + 6, left : left + 6] = torch.randint(100, 256, (3, 1, 1), generator=generator).byte()
    return images


def learned(name: str, steps: int = 60, **changes: object) -> tuple[ImageTokenizer, float]:
    """A tokenizer after a short training, and its PSNR before."""
    tokenizer = small(name, **changes).train()
    objective = tokenizer.objective()
    training = TrainingConfig(steps=steps, batch_size=64, learning_rate=5e-3, warmup_steps=5)
    optimizer = build_adamw(objective.parameter_groups(), training)
    before = evaluate(tokenizer.eval(), [{"images": shapes(1)}]).metrics["psnr"]
    objective.train()
    for step in range(steps):
        loss, _ = objective({"images": shapes()}, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        objective.after_update(True)
    return tokenizer.eval(), before


@pytest.mark.parametrize("name", MODELS)
def test_levels_are_coarse_to_fine_and_codes_make_images(name: str) -> None:
    tokenizer = small(name)
    images = torch.rand(3, 3, 16, 16)
    assert [tuple(level) for level in tokenizer.levels] == LEVELS[name]
    codes = tokenizer.encode(images)
    assert [code.shape for code in codes] == [(3, height * width) for height, width, _ in LEVELS[name]]
    decoded = tokenizer.decode(codes)
    assert decoded.shape == images.shape
    assert decoded.min() >= 0
    assert decoded.max() <= 1
    torch.testing.assert_close(tokenizer.encode(images[1:2])[-1], codes[-1][1:2])  # beside no other image


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vqvae", "residual", "two levels"])
def test_training_learns_and_the_saved_tokenizer_gives_equal_codes(name: str, tmp_path: Path) -> None:
    tokenizer, before = learned(name)
    images = shapes(1).float() / 255
    metrics = evaluate(tokenizer, [{"images": shapes(1)}]).metrics
    assert metrics["psnr"] > before + 3
    tokenizer.save_pretrained(tmp_path)
    loaded = ImageTokenizer.from_pretrained(tmp_path)
    codes = tokenizer.encode(images)
    assert all(torch.equal(a, b) for a, b in zip(loaded.encode(images), codes, strict=True))
    assert torch.equal(loaded.decode(codes), tokenizer.decode(codes))


def test_finer_levels_see_what_coarser_ones_decode_to() -> None:
    tokenizer = small("two levels").train()
    images = torch.rand(2, 3, 16, 16)
    coarse, fine = tokenizer.encode(images)
    with torch.no_grad():
        tokenizer.quantizers[0].codebooks[0].embedding.neg_()  # type: ignore[union-attr, index, operator]
    assert not torch.equal(tokenizer.encode(images)[1], fine)
    assert len(coarse) == len(fine)


def test_loss_and_every_gradient_are_finite_for_every_model() -> None:
    for name in MODELS:
        objective = small(name).objective().train()
        loss, _ = objective({"images": shapes()[:4]}, 0)
        loss.backward()
        assert torch.isfinite(loss)
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in objective.parameters()), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "vqvae2"}, "unknown key 'quantizer'"),
        ({"quantizer": EMA | {"codebook_size": 64}}, "does not fit config.json"),
        ({"quantizer": {"kind": "fsq", "channels": [4, 4, 3]}}, "does not fit config.json"),
    ],
)
def test_checkpoint_of_another_kind_or_size_is_a_one_line_error(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    small("vqvae").save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values["model"] |= changes
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=message) as caught:
        ImageTokenizer.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_collapse_is_told_with_what_to_try_and_the_histogram_shows_it() -> None:
    tokenizer = small("residual")
    tokenizer.quantizers[0].codebooks[1].embedding[1:] = 1e6  # type: ignore[union-attr, index, operator]
    evaluation = evaluate(tokenizer, [{"images": shapes()}])
    assert evaluation.metrics["codebook_usage_1"] == 1 / 32
    warning = collapsed(evaluation, floor=0.05)
    assert warning is not None
    assert "3.1% on level 1: lower training.learning_rate" in warning
    assert collapsed(evaluation, floor=0.01) is None
    assert usage_histogram(evaluation.counts).size == (640, 360)


def test_bits_a_pixel_are_those_of_the_codes_entropy() -> None:
    evaluation = evaluate(small("two levels"), [{"images": shapes()}])
    bits = 0.0
    for count, positions in zip(evaluation.counts, (16, 64), strict=True):
        bits += (
            positions
            * torch.distributions.Categorical(count / count.sum()).entropy().item()
            / torch.log(torch.tensor(2.0)).item()
        )
    assert evaluation.metrics["bits_per_pixel"] == pytest.approx(bits / 256, rel=1e-6)


def test_activation_checkpointing_recomputes_every_residual_block_and_changes_no_gradient() -> None:
    gradients, calls = [], []
    for recompute in (False, True):
        objective = small("two levels").train().objective()
        blocks = objective.blocks()
        assert len(blocks) == 2 * 2 * 1  # encoder and decoder, two resolutions, one block each
        if recompute:
            for block in blocks:
                block.get_submodule("branch").register_forward_pre_hook(lambda *_: calls.append(1))
            checkpoint_activations(objective)
        torch.manual_seed(0)
        loss, _ = objective({"images": shapes()[:4]}, 0)
        loss.backward()
        gradients.append([p.grad for p in objective.parameters()])
    assert len(calls) == 2 * len(blocks)
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_a_quantizer_without_a_distribution_says_that_it_has_no_samples() -> None:
    with pytest.raises(UserError, match="EmaQuantizer has no distribution over codes") as caught:
        small("vqvae").sample(torch.rand(1, 3, 16, 16))  # type: ignore[operator]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["vqvae", "two levels"])
def test_validation_in_a_training_in_bf16_sees_the_codes_that_tokenize_writes(name: str) -> None:
    tokenizer, images = small(name, widths=(32, 32)), torch.cat([shapes(seed) for seed in range(4)])
    codes = tokenizer.encode(images.float() / 255)
    with torch.autocast("cpu", torch.bfloat16):
        evaluation = evaluate(tokenizer, [{"images": images}])
        assert any(not torch.equal(a, b) for a, b in zip(tokenizer.encode(images.float() / 255), codes, strict=True))
    for count, level in zip(evaluation.counts, codes, strict=True):
        assert torch.equal(count, torch.bincount(level.flatten(), minlength=len(count)).double())
