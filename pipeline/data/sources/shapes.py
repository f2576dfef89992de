"""The world of shapes as a source: drawn scenes whose captions an exact judge can check (`pipeline/shapes/`)."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping

from pipeline.config.base import digest
from pipeline.config.prepare import ShapesSource
from pipeline.core.errors import UserError
from pipeline.core.image_size import ImageSize, told
from pipeline.data.sources.base import Counted, Item, Part, Record
from pipeline.shapes.drawing import draw
from pipeline.shapes.judge import SMALLEST_SIDE
from pipeline.shapes.world import VERSION, sample


class Shapes:
    """The source `kind: shapes`: nothing is read, every sample is made from (seed, number)."""

    credit = None

    def __init__(self, config: ShapesSource, image_size: ImageSize) -> None:
        if not isinstance(image_size, int):
            found = told(image_size)
            raise UserError(f"prepare.image_size: scenes of source shapes are square, found {found}: set one number")
        if image_size < SMALLEST_SIDE:
            raise UserError(
                f"prepare.image_size: expected {SMALLEST_SIDE} or more for the source shapes, found {image_size}: in"
                f" smaller images small shapes cannot be told apart"
            )
        self.samples = config.samples
        self.seed, self.grid = config.seed, config.grid
        self.image_size = image_size

    def parts(self, size: int) -> Iterator[Part]:
        for number, start in enumerate(range(0, self.samples, size)):
            items = range(start, min(start + size, self.samples))
            about = [VERSION, self.seed, self.image_size, start, len(items), *([self.grid] if self.grid else [])]
            yield Part(number, digest(about), (start, len(items)))

    def left_out(self) -> Mapping[str, int]:
        return {}

    def records(self, part: Part) -> Iterator[Item]:
        start, count = part.items
        for number in range(start, start + count):
            caption, scene = sample(self.seed, number, self.grid)
            png = io.BytesIO()
            draw(scene, self.image_size).save(png, "PNG", compress_level=1)
            yield Record(f"{number:08d}", png.getvalue(), caption, ".png")
        yield Counted(count)
