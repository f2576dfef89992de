from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from pipeline.data import png
from tests.data.sample_images import encoded
from tests.data.sample_images import image as drawn


def _smooth(size: tuple[int, int]) -> Image.Image:
    return drawn(1, (4, 4)).resize(size, Image.Resampling.BICUBIC)


@pytest.mark.parametrize("image", [drawn(0), drawn(1, (1, 1)), drawn(2, (7, 3)), _smooth((64, 64))])
def test_images_come_back_exactly_and_pillow_reads_the_same(image: Image.Image) -> None:
    content = png.encode(image)
    expected = np.asarray(image)
    assert (png.decode(content) == expected.transpose(2, 0, 1)).all()
    assert (np.asarray(Image.open(io.BytesIO(content))) == expected).all()


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA"])
def test_png_files_of_other_writers_are_read_too(mode: str) -> None:
    image = _smooth((40, 30)).convert(mode)
    assert (png.decode(encoded(image)) == np.asarray(image.convert("RGB")).transpose(2, 0, 1)).all()


def test_files_are_about_as_small_as_pillows() -> None:
    image = _smooth((64, 64))
    assert len(png.encode(image)) < 1.3 * len(encoded(image))
