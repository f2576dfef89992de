"""Tensors, PIL images and PNG files hold the same pixels."""

import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.core.errors import UserError
from pipeline.core.image_io import png_bytes, to_pil, to_tensor, to_uint8_tensor


def test_every_8_bit_value_survives_the_way_to_an_image_and_back() -> None:
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    images = to_pil(values.float() / 255)
    assert len(images) == 2
    assert torch.equal(to_uint8_tensor(images), values)
    assert torch.equal(to_tensor(images), values.float() / 255)


def test_values_are_rounded_and_those_beyond_the_range_do_not_wrap_around() -> None:
    pixels = torch.tensor([-0.2, 0.4999 / 255, 0.5001 / 255, 1.3]).view(1, 1, 2, 2).expand(1, 3, 2, 2)
    assert np.asarray(to_pil(pixels)[0])[..., 0].ravel().tolist() == [0, 0, 1, 255]


def test_a_png_file_holds_the_pixels() -> None:
    [image] = to_pil(torch.rand(1, 3, 5, 7))
    found = Image.open(io.BytesIO(png_bytes(image)))
    assert found.format == "PNG"
    assert (np.asarray(found) == np.asarray(image)).all()


def test_images_of_several_sizes_are_refused() -> None:
    with pytest.raises(UserError, match="expected one size, found 2 \\(4 × 3, 4 × 4\\)"):
        to_tensor([Image.new("RGB", (4, 4)), Image.new("RGB", (4, 3))])


def test_writing_png_files_loads_no_torch() -> None:
    code = "import sys, pipeline.core.image_io as io; from PIL import Image; io.png_bytes(Image.new('RGB', (1, 1)))"
    subprocess.run([sys.executable, "-c", f"{code}; sys.exit('torch' in sys.modules)"], check=True)
