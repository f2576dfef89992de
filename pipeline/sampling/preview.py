"""An image in the terminal that fills in row by row, two pixels per character (upper half block, 24-bit colours)."""

from __future__ import annotations

import sys
from typing import TextIO

import numpy as np
from PIL import Image
from torch import Tensor

from pipeline.sampling.pipeline import Pipeline

_SIDE = 32  # characters per row, and twice the number of lines


class Preview:
    """Draws the first image of the batch over itself; goes into `Callbacks(on_row=Preview(pipeline))`."""

    def __init__(self, pipeline: Pipeline, stream: TextIO = sys.stderr) -> None:
        self.pipeline, self.stream = pipeline, stream
        self._lines = 0  # of the last drawing, which the next one covers

    def __call__(self, codes_BN: Tensor, drawn: int) -> None:
        """`drawn` of the N codes of each image are there."""
        image = self.pipeline.decode(codes_BN[:1])[0]
        model = self.pipeline.transformer
        levels = model.layout.levels
        into_last = max(drawn - sum(level.positions for level in levels[:-1]), 0)
        generated = into_last / levels[-1].positions if len(levels) == 1 or into_last else 1.0
        if model.order != "raster":  # codes lie anywhere, and those that are missing are code 0
            generated = 1.0
        self._draw(image, generated)
        if drawn == codes_BN.shape[1]:  # the next batch is drawn below
            self._lines = 0

    def _draw(self, image: Image.Image, generated: float) -> None:
        pixels = np.asarray(image.resize((_SIDE, _SIDE), Image.Resampling.BOX))
        rows = round(_SIDE * generated)
        lines = []
        for row in range(0, rows - rows % 2, 2):
            pairs = zip(pixels[row], pixels[row + 1], strict=True)
            lines.append("".join(f"\x1b[38;2;{_rgb(a)};48;2;{_rgb(b)}m▀" for a, b in pairs) + "\x1b[0m")
        up = f"\x1b[{self._lines}A" if self._lines else ""
        self.stream.write("\r\x1b[K" + up + "".join(f"\x1b[K{line}\n" for line in lines))
        self.stream.flush()
        self._lines = len(lines)


def _rgb(pixel: np.ndarray) -> str:
    return ";".join(map(str, pixel.tolist()))
