"""Promises of image prompts that need no model; those of a trained one are in test_pipeline.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.core.errors import UserError
from pipeline.image_tokenizer.base import ImageTokenizer, build
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


def _drawn_anew(prompt: ImagePrompt, tokenizer: ImageTokenizer) -> list[list[int]]:
    """The codes of each level that are generated."""
    codes = known_codes(tokenizer, prompt, torch.device("cpu"))
    parts = codes.split([level.positions for level in tokenizer.levels])
    return [(part == UNKNOWN).nonzero().flatten().tolist() for part in parts]


def test_a_coarse_code_is_drawn_anew_only_where_nothing_stays_in_its_square() -> None:
    multiscale = {"kind": "multiscale", "scales": [1, 2, 3, 4], "codebook": {"kind": "ema", "codebook_size": 16}}
    tokenizer = build({"kind": "vqvae", "quantizer": multiscale, "widths": [8, 8, 8]}, image_size=16).eval()
    assert [level.positions for level in tokenizer.levels] == [1, 4, 9, 16]
    image = Image.effect_noise((16, 16), 90).convert("RGB")

    def hole(*box: int) -> list[list[int]]:
        mask = Image.new("L", (16, 16))
        mask.paste(255, box)
        return _drawn_anew(ImagePrompt(image, mask=mask), tokenizer)

    assert hole(13, 13, 14, 14) == [[], [], [], [15]]
    assert hole(7, 7, 16, 16) == [[], [3], [4, 5, 7, 8], [5, 6, 7, 9, 10, 11, 13, 14, 15]]
    assert hole(8, 8, 16, 16) == [[], [3], [8], [10, 11, 14, 15]]
    assert hole(0, 0, 16, 16) == [[*range(n)] for n in (1, 4, 9, 16)]
    assert _drawn_anew(ImagePrompt(image, keep_rows=3), tokenizer) == [[], [], [], [*range(12, 16)]]
    assert _drawn_anew(ImagePrompt(image, keep_rows=2), tokenizer) == [[], [2, 3], [6, 7, 8], [*range(8, 16)]]


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
