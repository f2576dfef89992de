"""VQ-VAE (van den Oord et al. 2017) and VQ-VAE-2 (Razavi et al. 2019), around any quantizer.

One grid of codes at the coarsest resolution, or one at each of the two or three coarsest, from coarse to fine:

    encoder:  image → h at each resolution
    level 0:  z = project(h_0)               → codes → e_0 → decoder's blocks, doubled → d_1
    level 1:  z = project([h_1, d_1])        → codes → d_1 + expand(e_1) → decoder's blocks …
    … → pixels

A level is quantized knowing what the coarser ones decode to, as in the paper, so it spends its codes on what is
missing. Where the paper has a decoder for each level and one for the image, here the one decoder of the architecture
serves as all of them: at each resolution that has codes, their vectors come in. A residual quantizer gives a position
several codes; each is a level of its own, of equal size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.config.base import Config
from pipeline.config.image_tokenizer import VQVAE2Config, VQVAEConfig
from pipeline.core.level import Level
from pipeline.image_tokenizer.architecture import Decoder, Encoder, conv
from pipeline.image_tokenizer.base import ImageTokenizer, TokenizerObjective, check_size
from pipeline.image_tokenizer.losses import ReconstructionLoss, output_to_images
from pipeline.image_tokenizer.quantizers import Quantized, Quantizer, build_quantizer


class VQVAE(ImageTokenizer):
    """Grids of codes, coarse to fine: grid i has (image_size / factor · 2^i)² positions."""

    config: VQVAEConfig | VQVAE2Config
    config_class: type[Config] = VQVAEConfig

    def __init__(self, config: VQVAEConfig | VQVAE2Config, image_size: int) -> None:
        check_size(image_size, config)
        super().__init__(config, image_size)
        widths = config.widths[::-1]
        self.encoder = Encoder(config)
        quantizers: list[Quantizer] = []
        for i, quantizer in enumerate(config.quantizers):
            values = 3 * (config.factor // 2**i) ** 2
            # Finer grids see the encoder's features beside what the coarser ones decode to.
            quantizers.append(build_quantizer(quantizer, widths[i] * (2 if i else 1), values))
        self.quantizers = nn.ModuleList(quantizers)
        self.decoder = Decoder(config, quantizers[0].code_width)
        self.expand = nn.ModuleList(conv(q.code_width, widths[i], 1) for i, q in enumerate(quantizers) if i)
        if config.channels_last:
            self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def levels(self) -> list[Level]:
        side = self.image_size // self.config.factor
        return [
            Level(side * 2**i, side * 2**i, size)
            for i, quantizer in enumerate(self._quantizers())
            for size in quantizer.codebook_sizes
        ]

    def forward(self, images_B3HW: Tensor, step: int) -> tuple[Tensor, list[Quantized]]:
        """The decoder's output in training, and what the quantizer of each grid says."""
        pyramid, x, found = self._pyramid(images_B3HW), None, []
        for i, quantizer in enumerate(self._quantizers()):
            x = self._advance(x, i)
            found.append(quantizer(self._features(pyramid[i], x), step))
            x = self._put_in(x, found[-1].vectors, i)
        assert x is not None
        return self.decoder.finish(x, len(found) - 1), found

    @torch.no_grad()
    def encode(self, images: Tensor) -> list[Tensor]:
        self._check_images(images)
        pyramid, x, codes = self._pyramid(images), None, []
        quantizers = self._quantizers()
        for i, quantizer in enumerate(quantizers):
            x = self._advance(x, i)
            of_grid = quantizer.encode(self._features(pyramid[i], x))
            codes += of_grid
            if i + 1 < len(quantizers):
                x = self._put_in(x, quantizer.vectors(of_grid), i)
        return codes

    @torch.no_grad()
    def decode(self, codes: list[Tensor]) -> Tensor:
        x, left = None, list(codes)
        quantizers = self._quantizers()
        for i, quantizer in enumerate(quantizers):
            x = self._advance(x, i)
            of_grid, left = left[: len(quantizer.codebook_sizes)], left[len(quantizer.codebook_sizes) :]
            x = self._put_in(x, quantizer.vectors(of_grid), i)
        assert x is not None
        return output_to_images(self.config.reconstruction, self.decoder.finish(x, len(quantizers) - 1))

    def objective(self) -> VQVAEObjective:
        return VQVAEObjective(self)

    def _quantizers(self) -> list[Quantizer]:
        return list(self.quantizers)  # type: ignore[arg-type]

    def _pyramid(self, images_B3HW: Tensor) -> list[Tensor]:
        """The encoder's features, coarse to fine."""
        if self.config.channels_last:
            images_B3HW = images_B3HW.contiguous(memory_format=torch.channels_last)
        return self.encoder(images_B3HW)[::-1]

    def _advance(self, x_BChw: Tensor | None, grid: int) -> Tensor | None:
        """What the decoder has before the vectors of grid `grid` come in."""
        return None if x_BChw is None else self.decoder.resolutions[grid - 1](x_BChw)

    def _features(self, h_BChw: Tensor, x_BChw: Tensor | None) -> Tensor:
        """What a grid is quantized from, [B,N,C], positions rows first."""
        both = h_BChw if x_BChw is None else torch.cat([h_BChw, x_BChw], dim=1)
        return both.flatten(2).transpose(1, 2)

    def _put_in(self, x_BChw: Tensor | None, vectors_BND: Tensor, grid: int) -> Tensor:
        side = self.image_size // self.config.factor * 2**grid
        e_BDhw = vectors_BND.transpose(1, 2).unflatten(2, (side, side))
        if x_BChw is None:
            return self.decoder.stem(e_BDhw)
        out: Tensor = x_BChw + self.expand[grid - 1](e_BDhw)
        return out


class VQVAE2(VQVAE):
    config_class = VQVAE2Config


class VQVAEObjective(TokenizerObjective):
    """Reconstruction plus what the quantizers ask for, a pixel value."""

    def __init__(self, tokenizer: VQVAE) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.reconstruction = ReconstructionLoss(tokenizer.config.reconstruction)

    def forward(self, batch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        images = batch["images"].float() / 255
        output, found = self.tokenizer(images, step)
        loss, metrics = self.reconstruction(images, output, step)
        for i, quantized in enumerate(found):
            suffix = f"_{i}" if len(found) > 1 else ""
            loss = loss + quantized.loss
            metrics |= {f"{name}{suffix}": value for name, value in quantized.metrics.items()}
            metrics[f"quantizer_loss{suffix}"] = quantized.loss.detach()
        return loss, metrics

    def after_update(self, applied: bool) -> None:
        """Codebooks learn once an update, after it."""
        for quantizer in self.tokenizer.quantizers:
            quantizer.after_update(applied)  # type: ignore[operator]
