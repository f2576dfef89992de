"""Random parts and mirror images of training images: functions of (seed, epoch, sample), so a resume repeats them."""

from __future__ import annotations

from random import Random
from typing import NamedTuple

import numpy as np
from PIL import Image

from pipeline.core.seeds import random_of
from pipeline.data.stored_image import Pixels


class Augment(NamedTuple):
    """What is done to an image before a training sees it."""

    flip: bool  # every other image, left to right
    min_scale: float  # smallest side of a random part / side of the image; 1: always the whole

    @property
    def is_on(self) -> bool:
        """Whether anything is."""
        return self.flip or self.min_scale < 1

    def apply(self, pixels: Pixels, seed: int, epoch: int, sample: int) -> Pixels:
        """uint8 [3, H, W] -> the same size. `sample`: counted through the split."""
        random = random_of("augment", seed, epoch, sample)
        if self.min_scale < 1:
            part = random_part(Image.fromarray(pixels.transpose(1, 2, 0)), self.min_scale, random)
            pixels = np.asarray(part).transpose(2, 0, 1)
        if self.flip and random.random() < 0.5:
            pixels = pixels[:, :, ::-1]
        return pixels


def random_part(image: Image.Image, min_scale: float, random: Random) -> Image.Image:
    """A part of an image with its shape, resized back to its size. `min_scale`: smallest side / side of the image."""
    scale = random.uniform(min_scale, 1.0)
    width, height = image.width * scale, image.height * scale
    left, top = random.uniform(0, image.width - width), random.uniform(0, image.height - height)
    return image.resize(image.size, Image.Resampling.LANCZOS, box=(left, top, left + width, top + height))
