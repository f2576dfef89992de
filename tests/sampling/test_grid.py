"""Promises of pipeline/sampling/grid.py and prompts.py."""

from __future__ import annotations

import pytest
from PIL import Image
from pydantic import ValidationError

from pipeline.config.generate import GenerateConfig
from pipeline.core.errors import UserError
from pipeline.sampling.grid import Group, Tile, _font, _wrap, grid
from pipeline.sampling.prompts import check_against_training, sampled_rows

CAPTIONS = ["red heart", "blue heart", "Grinning  cat"]


def test_every_image_is_on_the_sheet_in_crisp_squares() -> None:
    colours = [(200, 10 * i, 30) for i in range(11)]
    tiles = [Tile(Image.new("RGB", (4, 4), colour), f"caption {i}") for i, colour in enumerate(colours)]
    sheet = grid([Group("First", tiles[:5], "a note"), Group("Second", tiles[5:])], columns=4, side=32)
    counts = {colour: count for count, colour in sheet.getcolors(sheet.width * sheet.height) or []}
    assert all(counts[colour] == 32 * 32 for colour in colours)


def test_captions_are_wrapped_and_never_wider_than_the_image() -> None:
    for text in (
        "a",
        "Åland Türkiye Škoda ñandú",
        "smiling face with smiling eyes and three hearts around it, pleased",
        "x" * 200,
        "",
    ):
        lines = _wrap(text, 96)
        assert len(lines) <= 3
        assert all(_font(14, text).getlength(line) <= 96 for line in lines)
    assert _wrap("red heart", 96) == ["red heart"]


def test_prompts_in_the_wrong_list_are_named_with_the_nearest_caption() -> None:
    check_against_training(GenerateConfig(training_prompts=["red heart", "grinning Cat"]), CAPTIONS)
    with pytest.raises(UserError, match="'red hart', which is none; the nearest is 'red heart'"):
        check_against_training(GenerateConfig(training_prompts=["red hart"]), CAPTIONS)
    with pytest.raises(UserError, match="'Blue heart', a caption of the train split"):
        check_against_training(GenerateConfig(new_prompts=["Blue heart"]), CAPTIONS)


def test_sampled_captions_are_fixed_by_the_seed_and_not_more_than_there_are() -> None:
    assert sampled_rows(100, 10, 3) == sampled_rows(100, 20, 3)[:10]
    assert sampled_rows(100, 100, 3) != sampled_rows(100, 100, 4)
    assert sorted(sampled_rows(5, 5, 0)) == list(range(5))
    with pytest.raises(UserError, match="at most the 5 captions"):
        sampled_rows(5, 6, 0)


def test_empty_and_repeated_prompts_are_refused_by_the_config() -> None:
    with pytest.raises(ValidationError, match="empty"):
        GenerateConfig(new_prompts=[" "])
    with pytest.raises(ValidationError, match="listed twice"):
        GenerateConfig(training_prompts=["a"], new_prompts=["a"])
