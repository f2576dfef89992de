"""`image_tokenizer.init_from`: a tokenizer starts with another one's weights, as far as they fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from pipeline.config.image_tokenizer_model import ModelConfig
from pipeline.image_tokenizer.base import ImageTokenizer, build
from pipeline.image_tokenizer.start import start_from

MODEL: dict[str, Any] = {"kind": "vqvae", "widths": [8, 8], "blocks": 1, "block_kernels": [3, 1], "bottleneck": 2}


def _tokenizer(seed: int, size: int = 16, **quantizer: Any) -> ImageTokenizer:
    torch.manual_seed(seed)
    book = {} if "codebook" in quantizer else {"kind": "ema", "codebook_size": 16, "code_width": 4}
    of_kind = book | quantizer
    config: ModelConfig = TypeAdapter(ModelConfig).validate_python(MODEL | {"quantizer": of_kind})
    return build(config, size)


@pytest.fixture
def other(tmp_path: Path) -> Path:
    tokenizer = _tokenizer(1)
    with torch.no_grad():
        for name, value in tokenizer.state_dict().items():
            if value.is_floating_point():
                value.normal_()
            assert name
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def test_at_another_image_size_every_tensor_is_the_others(other: Path) -> None:
    tokenizer = _tokenizer(2, size=32)
    fit = start_from(tokenizer, other)
    theirs = ImageTokenizer.from_pretrained(other).state_dict()
    assert fit.taken == len(theirs)
    assert all(torch.equal(value, theirs[name]) for name, value in tokenizer.state_dict().items())


@pytest.mark.parametrize(
    "quantizer",
    [
        {"kind": "ema"},
        {"kind": "gradient"},
        {"kind": "ema", "depth": 2},
        {"kind": "multiscale", "scales": [1, 2, 8], "codebook": {"kind": "ema", "codebook_size": 16, "code_width": 4}},
    ],
    ids=["ema", "gradient", "residual", "multiscale"],
)
def test_a_codebook_that_has_learned_goes_on_from_what_it_is(quantizer: dict[str, Any], tmp_path: Path) -> None:
    """Its next step is the one that the other tokenizer's codebook makes, not a start from that step's k-means."""
    images = torch.randint(256, (8, 3, 16, 16), generator=torch.Generator().manual_seed(0)).byte()

    def step(tokenizer: ImageTokenizer) -> dict[str, Tensor]:
        torch.manual_seed(3)
        objective = tokenizer.train().objective()
        loss, _ = objective({"images": images}, 0)
        loss.backward()
        objective.after_update(True)
        return tokenizer.state_dict()

    other, tokenizer = _tokenizer(1, **quantizer), _tokenizer(2, **quantizer)
    step(other)
    other.save_pretrained(tmp_path)
    start_from(tokenizer, tmp_path)
    expected, found = step(other), step(tokenizer)
    assert [name for name, value in found.items() if not torch.equal(value, expected[name])] == []


def test_positions_of_a_vision_transformer_are_interpolated_to_another_grid(tmp_path: Path) -> None:
    vit = {"kind": "vit", "patch_size": 4, "width": 8, "layers": 1, "heads": 1, "quantizer": {"kind": "fsq"}}
    small, large = build(vit, 16), build(vit, (32, 64))
    with torch.no_grad():
        small.get_parameter("encoder.resolutions.0.positions").zero_()[3] += torch.arange(4.0)[:, None]
    small.save_pretrained(tmp_path)
    fit = start_from(large, tmp_path)
    assert fit.fresh == []
    assert sorted(fit.changed) == [
        f"{half}.resolutions.0.positions: a grid of 4×4 to 8×16, interpolated" for half in ("decoder", "encoder")
    ]
    found = large.get_parameter("encoder.resolutions.0.positions")
    assert torch.equal(found[:3], torch.zeros(3, 8, 16))
    assert (found[3].diff(dim=0) > 0).all()  # from top to bottom
    assert found[3].diff(dim=1).abs().max() < 1e-6
    wider = start_from(build(vit | {"width": 16}, 16), tmp_path)
    assert "encoder.resolutions.0.positions: expected [16, 4, 4], found [8, 4, 4]" in wider.fresh
    assert start_from(build(vit | {"heads": 2}, 16), tmp_path).changed == ["heads: 1 -> 2"]


def test_a_codebook_of_another_size_begins_fresh_with_all_its_statistics(other: Path) -> None:
    tokenizer, fresh = _tokenizer(2, codebook_size=32), _tokenizer(2, codebook_size=32).state_dict()
    fit = start_from(tokenizer, other)
    theirs = ImageTokenizer.from_pretrained(other).state_dict()
    left = {line.partition(":")[0] for line in fit.fresh}
    assert any("codebook" in name for name in left)
    for name, value in tokenizer.state_dict().items():
        assert torch.equal(value, fresh[name] if name in left else theirs[name]), name
        assert not ("codebooks.0." in name and name not in left)
