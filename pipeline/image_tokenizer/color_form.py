"""Two codes a position, one of color and one of form, so that any color goes with any form: an idea of ours.

    color:  the color of each cell's darkest pixel  → encoder      → code → stem(e_color)
    form:   the image's dark channel, no color      → form_encoder → code → scale and shift that → decoder → pixels

Neither code knows what the other says, so an image may have a form in a color in which training never saw it; for flat
drawings, whose parts have one color each. The dark channel is the least of red, green and blue (He et al. 2009); scale
and shift as Perez et al. 2018 have them. How dark that is still tells colors apart, unless it is seen in proportion to
the darkest of its cell (`relative_form`): then the form of a drawing on white is what covers it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config.image_tokenizer_model import ColorFormConfig, ModelConfig
from pipeline.core.image_size import ImageSize
from pipeline.image_tokenizer.architecture import DecoderHalf, Encoder, EncoderHalf, conv, use_channels_last
from pipeline.image_tokenizer.vqvae import VQVAE, VectorsOf

_NEARLY_WHITE = 0.1  # a cell that is nowhere as far from white as this is stretched as if it were


class ColorForm(VQVAE):
    """Grids of color and of form, each of height / factor × width / factor positions."""

    config_class = ColorFormConfig

    def __init__(self, config: ModelConfig, image_size: ImageSize) -> None:
        super().__init__(config, image_size)
        assert isinstance(config, ColorFormConfig)
        self.form_encoder = Encoder(config)
        if config.channels_last:
            use_channels_last(self.form_encoder)

    def halves(self) -> list[EncoderHalf | DecoderHalf]:
        return [*super().halves(), self.form_encoder]

    def _resolution(self, grid: int) -> int:
        return 0

    def _features_width(self, grid: int) -> int:
        return self.config.widths[-1]

    def _new_expand(self, code_width: int, width: int) -> nn.Module:
        return conv(code_width, 2 * width, 1)

    def _encoded(self, images_B3HW: Tensor) -> list[Tensor]:
        assert isinstance(self.config, ColorFormConfig)
        dark_B1HW = images_B3HW.amin(dim=1, keepdim=True)
        if self.config.relative_form:
            dark_B1HW = _in_proportion(dark_B1HW, self.config.factor)
        seen = [_darkest(images_B3HW, self.config.factor), dark_B1HW.repeat(1, 3, 1, 1)]
        if self.config.channels_last:
            seen = [pixels_B3HW.contiguous(memory_format=torch.channels_last) for pixels_B3HW in seen]
        return [self.encoder(seen[0])[-1], self.form_encoder(seen[1])[-1]]

    def _features(self, h_BChw: Tensor, context: Tensor | None) -> Tensor:
        return super()._features(h_BChw, None)

    def _walk(self, grids: int, vectors_of: VectorsOf) -> Tensor | None:
        return self._decoder_input(0, vectors_of, None) if grids else None

    def _joined(self, context_BChw: Tensor, e_BChw: Tensor) -> Tensor:
        scale, shift = e_BChw.chunk(2, dim=1)
        return context_BChw * (1 + scale) + shift


def _in_proportion(dark_B1HW: Tensor, cell: int) -> Tensor:
    """A dark channel, of which each cell of `cell` × `cell` pixels is stretched to between 0 and white."""
    ink_B1HW = 1 - dark_B1HW
    most_B1hw = F.max_pool2d(ink_B1HW, cell).clamp(min=_NEARLY_WHITE)
    return 1 - ink_B1HW / F.interpolate(most_B1hw, scale_factor=cell, mode="nearest")


def _darkest(images_B3HW: Tensor, cell: int) -> Tensor:
    """Every pixel as the darkest one (least sum of channels) of its cell of `cell` × `cell` pixels."""
    _, index_B1hw = F.max_pool2d(-images_B3HW.sum(dim=1, keepdim=True), cell, return_indices=True)
    index_B3n = index_B1hw.flatten(2).expand(-1, 3, -1)
    colors_B3hw = images_B3HW.flatten(2).gather(2, index_B3n).unflatten(2, index_B1hw.shape[2:])
    return F.interpolate(colors_B3hw, scale_factor=cell, mode="nearest")
