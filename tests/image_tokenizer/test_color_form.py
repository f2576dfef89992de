"""`kind: color-form`: codes of color do not depend on form, nor those of form on color, which they scale."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.image_tokenizer.base import ImageTokenizer, build
from pipeline.image_tokenizer.color_form import ColorForm

EMA = {"kind": "ema", "codebook_size": 32, "code_width": 8}
MODEL = {"kind": "color-form", "widths": [16, 16], "blocks": 1, "block_kernels": [3, 1], "bottleneck": 1}


def tokenizer(**changed: object) -> ImageTokenizer:
    torch.manual_seed(0)
    return build({**MODEL, "patch_size": 2, "color": EMA, "form": EMA, **changed}, 16)


def drawn_in(color: tuple[float, float, float]) -> torch.Tensor:
    """A ramp from white to `color`, whose least channel is 0."""
    ink = torch.linspace(0, 1, 16).expand(16, 16)
    return torch.stack([1 - ink * (1 - channel) for channel in color])[None]


def test_codes_of_a_form_are_the_same_in_every_color_and_those_of_color_are_not() -> None:
    model = tokenizer()
    (color, form), (other_color, other_form) = (model.encode(drawn_in(c)) for c in ((1.0, 0.0, 0.2), (0.0, 0.3, 1.0)))
    assert torch.equal(form, other_form)
    assert len(form.unique()) > 1
    assert not torch.equal(color, other_color)


def test_a_relative_form_is_the_same_in_colors_that_are_not_as_dark() -> None:
    colors = (1.0, 0.05, 0.2), (0.3, 0.4, 0.9)
    relative = [tokenizer(relative_form=True).encode(drawn_in(color))[1] for color in colors]
    assert torch.equal(*relative)
    assert len(relative[0].unique()) > 1
    absolute = [tokenizer().encode(drawn_in(color))[1] for color in colors]
    assert not torch.equal(*absolute)


def test_codes_of_a_color_are_the_same_in_every_form_and_those_of_form_are_not() -> None:
    model, images = tokenizer(), torch.ones(2, 3, 16, 16)
    for cell_y in range(0, 16, 4):  # a position has 4 × 4 pixels
        color = torch.tensor([cell_y / 12, 0.0, 1 - cell_y / 12])[:, None, None]
        images[0, :, cell_y + 1 : cell_y + 2, 1:14] = color
        images[1, :, cell_y : cell_y + 4, :] = color
    color_codes, form_codes = model.encode(images)
    assert torch.equal(color_codes[0], color_codes[1])
    assert not torch.equal(form_codes[0], form_codes[1])


def test_a_form_scales_and_shifts_its_color() -> None:
    model = tokenizer()
    assert isinstance(model, ColorForm)
    context, scale, shift = torch.randn(3, 2, 16, 4, 4)
    assert torch.equal(model._joined(context, torch.cat([scale, shift], dim=1)), context * (1 + scale) + shift)


@pytest.mark.parametrize("patch_size", [2, 4])
def test_it_trains_in_all_of_its_parts_and_loads_as_it_was_saved(tmp_path: Path, patch_size: int) -> None:
    model = tokenizer(patch_size=patch_size)
    assert [(level.height, level.width) for level in model.levels] == [(8 // patch_size,) * 2] * 2
    objective = model.objective()
    loss, _ = objective({"images": torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)}, 0)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())  # several ranks wait for each
    assert len(objective.blocks()) == 6
    model.save_pretrained(tmp_path)
    images = torch.rand(2, 3, 16, 16)
    again, codes = ImageTokenizer.from_pretrained(tmp_path), model.eval().encode(images)
    assert all(torch.equal(a, b) for a, b in zip(again.encode(images), codes, strict=True))
    assert torch.equal(again.decode(codes), model.decode(codes))
