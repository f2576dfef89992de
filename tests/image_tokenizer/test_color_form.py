"""`vqvae2` with `finer: form`: coarse codes do not depend on form, finer ones not on color, which they scale."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.image_tokenizer.base import ImageTokenizer, build
from pipeline.image_tokenizer.vqvae import VQVAE2

EMA = {"kind": "ema", "codebook_size": 32, "code_width": 8}
MODEL = {"kind": "vqvae2", "patch_size": 2, "widths": [16, 16], "blocks": 1, "block_kernels": [3, 1], "bottleneck": 1}


def tokenizer(finer: str) -> ImageTokenizer:
    torch.manual_seed(0)
    return build({**MODEL, "quantizers": [EMA, EMA], "finer": finer}, 16)


def drawn_in(color: tuple[float, float, float]) -> torch.Tensor:
    """A ramp from white to `color`, whose least channel is 0."""
    ink = torch.linspace(0, 1, 16).expand(16, 16)
    return torch.stack([1 - ink * (1 - channel) for channel in color])[None]


@pytest.mark.parametrize("finer", ["form", "all"])
def test_finer_codes_of_a_form_are_the_same_in_every_color_and_coarse_ones_are_not(finer: str) -> None:
    model = tokenizer(finer)
    (coarse, fine), (other_coarse, other_fine) = (model.encode(drawn_in(c)) for c in ((1.0, 0.0, 0.2), (0.0, 0.3, 1.0)))
    assert torch.equal(fine, other_fine) == (finer == "form")
    assert len(fine.unique()) > 1
    assert not torch.equal(coarse, other_coarse)


@pytest.mark.parametrize("finer", ["form", "all"])
def test_coarse_codes_of_a_color_are_the_same_in_every_form_and_finer_ones_are_not(finer: str) -> None:
    model, images = tokenizer(finer), torch.ones(2, 3, 16, 16)
    for cell_y in range(0, 16, 4):  # cells of the coarsest grid have 4 × 4 pixels
        color = torch.tensor([cell_y / 12, 0.0, 1 - cell_y / 12])[:, None, None]
        images[0, :, cell_y + 1 : cell_y + 2, 1:14] = color
        images[1, :, cell_y : cell_y + 4, :] = color
    coarse, fine = model.encode(images)
    assert torch.equal(coarse[0], coarse[1]) == (finer == "form")
    assert not torch.equal(fine[0], fine[1])


def test_the_part_of_a_finer_grid_scales_and_shifts() -> None:
    model = tokenizer("form")
    assert isinstance(model, VQVAE2)
    context, scale, shift = torch.randn(3, 2, 16, 8, 8)
    assert torch.equal(model._joined(context, torch.cat([scale, shift], dim=1)), context * (1 + scale) + shift)


def test_it_trains_in_all_of_its_parts_and_loads_as_it_was_saved(tmp_path: Path) -> None:
    model = tokenizer("form")
    objective = model.objective()
    loss, _ = objective({"images": torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)}, 0)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())  # several ranks wait for each
    assert len(objective.blocks()) == 5
    model.save_pretrained(tmp_path)
    images = torch.rand(2, 3, 16, 16)
    again = ImageTokenizer.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(again.encode(images), model.eval().encode(images), strict=True))
