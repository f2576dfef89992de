"""Promises of image prompts that need no model; those of a trained one are in test_pipeline.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.core.errors import UserError
from pipeline.image_tokenizer.base import build
from pipeline.sampling.draw_next import UNKNOWN
from pipeline.sampling.image_prompt import ImagePrompt, extended, known_codes


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


def test_an_image_prompt_takes_images_of_any_mode_and_leaves_what_is_transparent_in_a_mask() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    colors = Image.fromarray(pixels).quantize(8)
    assert (np.asarray(extended(colors, {"left": 5}).image)[:, 5:] == np.asarray(colors.convert("RGB"))[:, :11]).all()

    tokenizer = build({"kind": "vqvae", "widths": [8, 8]}, image_size=16).eval()
    covered = np.full((16, 16, 1), 255, np.uint8)
    covered[:, 8:] = 0
    image = Image.fromarray(np.concatenate([pixels, covered], axis=2))
    white = Image.new("RGB", (16, 16), "white")
    white.paste(Image.fromarray(pixels[:, :8]))
    mask = Image.fromarray(np.concatenate([np.full_like(pixels, 255), covered[::-1, ::-1]], axis=2))
    black_left = Image.new("L", (16, 16), 255)
    black_left.paste(0, (0, 0, 8, 16))

    def known(image: Image.Image, mask: Image.Image) -> list[int]:
        return list(known_codes(tokenizer, ImagePrompt(image, mask=mask), torch.device("cpu")).tolist())

    assert known(image, mask) == known(white, black_left)
    assert {UNKNOWN} < set(known(image, mask))
    of_integers = Image.fromarray(np.asarray(black_left, dtype=np.int32))
    assert known(white, of_integers) == known(white, black_left)


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
