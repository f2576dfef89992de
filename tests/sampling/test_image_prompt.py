"""Promises of image prompts that need no model; those of a trained one are in test_pipeline.py."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from pipeline.core.errors import UserError
from pipeline.sampling.image_prompt import extended


def test_an_extended_image_moves_away_and_its_strips_are_masked_and_show_its_edge() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    prompt = extended(Image.fromarray(pixels), {"left": 5, "bottom": 3})
    moved, mask = np.asarray(prompt.image), np.asarray(prompt.mask)
    assert (moved[:13, 5:] == pixels[3:, :11]).all()
    assert (moved[:13, :5] == pixels[3:, :1]).all()
    assert (moved[13:, 5:] == pixels[15:, :11]).all()
    assert (mask[:13, 5:] == 0).all()
    assert (mask[:, :5] == 255).all()
    assert (mask[13:] == 255).all()
    right = extended(Image.fromarray(pixels), {"right": 4, "top": 1})
    assert (np.asarray(right.image)[1:, :12] == pixels[:15, 4:]).all()
    assert (np.asarray(right.mask) == 0).sum() == 15 * 12


@pytest.mark.parametrize(
    ("sides", "complaint"),
    [
        ({"up": 3}, "extend: expected left, right, top or bottom, found 'up'"),
        ({"top": 3, "bottom": 1}, "extend: expected top or bottom, found both: the image moves one way"),
        ({"left": 16}, "extend: expected left of 1 to 15 pixels, found 16"),
        ({"left": 0}, "extend: expected left of 1 to 15 pixels, found 0"),
    ],
)
def test_sides_that_there_are_not_are_refused(sides: dict[str, int], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        extended(Image.new("RGB", (16, 16)), sides)
