"""Images that are not square, on the page and on the sheets beside it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageColor

from pipeline.config.pipeline import load_pipeline
from pipeline.core.image_io import from_png, png_bytes
from pipeline.orchestration.graph import stages_of
from pipeline.report.build import build_report
from pipeline.report.shown_images import GeneratedImage, sheet


def test_the_page_says_which_side_of_a_rectangle_is_its_height(tiny_run: Path, tmp_path: Path) -> None:
    config = load_pipeline(tiny_run / "config.yaml")
    stages = {stage.name: tiny_run / stage.name for stage in stages_of(config)[:-1]}
    assert "16×16 px" in build_report(stages, config).page
    stages["prepare"] = Path(shutil.copytree(tiny_run / "prepare", tmp_path / "prepare"))
    index = json.loads((stages["prepare"] / "index.json").read_text())
    (stages["prepare"] / "index.json").unlink()
    (stages["prepare"] / "index.json").write_text(json.dumps(index | {"image_size": [24, 16]}))
    page = build_report(stages, config).page
    assert "24×16 (height × width) px" in page
    assert "[24, 16]" not in page


@pytest.mark.parametrize("size", [(16, 16), (16, 80), (80, 16)])
def test_a_sheet_shows_all_of_images_of_any_shape(size: tuple[int, int]) -> None:
    width, height = size
    corners = {"red": (0, 0), "lime": (width - 1, 0), "blue": (0, height - 1), "magenta": (width - 1, height - 1)}
    image = Image.new("RGB", size, "yellow")
    for color, place in corners.items():
        image.paste(color, (*place, place[0] + 1, place[1] + 1))
    shown = GeneratedImage("red heart", png_bytes(image), png_bytes(image), "red heart", 1.0)
    drawn = np.asarray(from_png(sheet("random", [shown])).convert("RGB"))
    pixel = 80 / width  # of the sheet: a pair is 160 wide
    for color in corners:
        there = (drawn == ImageColor.getrgb(color)).all(axis=-1).sum()
        assert there == pytest.approx(2 * pixel**2), color
