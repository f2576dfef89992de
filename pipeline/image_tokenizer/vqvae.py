"""VQ-VAE (van den Oord et al. 2017) and VQ-VAE-2 (Razavi et al. 2019), around any quantizer.

One grid of codes at the coarsest resolution, or one at each of the two or three coarsest, from coarse to fine:

    encoder:  image → h at each resolution
    grid 0:   z = project(h_0)               → codes → e_0 → decoder's resolution 0: blocks, up → d_1
    grid 1:   z = project([h_1, d_1])        → codes → d_1 + expand(e_1) → decoder's resolution 1 …
    … → pixels

A grid is quantized knowing what the coarser ones decode to, as in the paper, so it spends its codes on what is
missing. Where the paper has a decoder for each level and one for the image, here the one decoder of the architecture
serves as all of them: at each resolution that has codes, their vectors come in. A residual quantizer gives a position
several codes; each is a level of its own, of equal size. A multi-scale one has levels of every size up to its grid's.

With the Gumbel quantizer it is the discrete VAE (dvae.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from pipeline.config.image_tokenizer_model import (
    ArchitectureConfig,
    ModelConfig,
    ViTConfig,
    VQGANConfig,
    VQVAE2Config,
    VQVAEConfig,
)
from pipeline.core.image_size import ImageSize
from pipeline.core.level import Level
from pipeline.core.objective import Exported
from pipeline.image_tokenizer.architecture import Decoder, DecoderHalf, Encoder, EncoderHalf, conv, use_channels_last
from pipeline.image_tokenizer.base import ImageTokenizer, TokenizerObjective, check_size
from pipeline.image_tokenizer.losses import ReconstructionLoss, output_to_images
from pipeline.image_tokenizer.quantizers import Quantized, Quantizer, build_quantizer
from pipeline.image_tokenizer.quantizers.step_mean import StepMean
from pipeline.image_tokenizer.quantizers.step_noise import StepNoise
from pipeline.image_tokenizer.tiles import by_tiles, reach

# Vectors [B,N,D] of a grid, from its index and what the coarser ones decode to, [B,C,h,w] (None for the coarsest)
VectorsOf = Callable[[int, Tensor | None], Tensor]


class VQVAE(ImageTokenizer):
    """Grids of codes, coarse to fine: grid i has (height / factor · 2^i) × (width / factor · 2^i) positions."""

    config_class: type[ModelConfig] = VQVAEConfig

    def __init__(self, config: ModelConfig, image_size: ImageSize) -> None:
        check_size(image_size, config)
        super().__init__(config, image_size)
        widths = config.widths[::-1]
        self.encoder = self._new_encoder()
        quantizers: list[Quantizer] = []
        for i, quantizer in enumerate(config.quantizers):
            values = 3 * (config.factor // 2 ** self._resolution(i)) ** 2
            quantizers.append(build_quantizer(quantizer, self._features_width(i), values))
            quantizers[i].grids(*self._grid_shape(i))  # says so if it does not fit
        self.quantizers = nn.ModuleList(quantizers)
        self.decoder = self._new_decoder(quantizers[0].code_width)
        self.expand = nn.ModuleList(
            self._new_expand(q.code_width, widths[self._resolution(i)]) for i, q in enumerate(quantizers) if i
        )
        if config.channels_last:
            use_channels_last(self)

    def _new_encoder(self) -> EncoderHalf:
        assert isinstance(self.config, ArchitectureConfig)
        return Encoder(self.config)

    def _new_decoder(self, code_width: int) -> DecoderHalf:
        assert isinstance(self.config, ArchitectureConfig)
        return Decoder(self.config, code_width)

    def halves(self) -> list[EncoderHalf | DecoderHalf]:
        """Its stacks of resolutions."""
        return [self.encoder, self.decoder]

    def positions(self) -> list[nn.Parameter]:
        """What its halves learn about where a position lies."""
        return []

    def _resolution(self, grid: int) -> int:
        """Where a grid's vectors come in, counted from the coarsest."""
        return grid

    def _features_width(self, grid: int) -> int:
        """Channels that a grid is quantized from."""
        width = self.config.widths[::-1][grid]
        # Finer grids see the encoder's features beside what the coarser ones decode to.
        return width * (2 if grid else 1)

    def _new_expand(self, code_width: int, width: int) -> nn.Module:
        """What makes a later grid's vectors fit for `_joined`."""
        return conv(code_width, width, 1)

    @property
    def levels(self) -> list[Level]:
        found: list[Level] = []
        for i, quantizer in enumerate(self._quantizers()):
            shapes = quantizer.grids(*self._grid_shape(i))
            found += [Level(*shape, size) for shape, size in zip(shapes, quantizer.codebook_sizes, strict=True)]
        return found

    def forward(self, images_B3HW: Tensor, step: int) -> tuple[Tensor, list[Quantized]]:
        """The decoder's output in training, and what the quantizer of each grid says."""
        pyramid, found = self._pyramid(images_B3HW), []

        def vectors_of(grid: int, context: Tensor | None) -> Tensor:
            found.append(self._quantizers()[grid](self._features(pyramid[grid], context), step))
            return found[-1].vectors

        return self._decoded(vectors_of), found

    def quantize(self, images_B3HW: Tensor, step: int) -> None:
        """The quantizers' part of `forward`, for what they then know of these images."""
        pyramid, finest = self._pyramid(images_B3HW), len(self.quantizers) - 1

        def vectors_of(grid: int, context: Tensor | None) -> Tensor:
            found: Quantized = self._quantizers()[grid](self._features(pyramid[grid], context), step)
            return found.vectors

        vectors_of(finest, self._walk(finest, vectors_of))

    @torch.no_grad()
    def encode(self, images: Tensor) -> list[Tensor]:
        return self._codes(images, lambda quantizer, features: quantizer.encode(features))

    @torch.no_grad()
    def sample(self, images: Tensor) -> list[Tensor]:
        """Codes drawn from q(code | image) by torch's global generator, in the form that `encode` has.

        Ramesh et al. 2021, section 2.2, footnote: a regulariser for the transformer. Raises UserError where a quantizer
        has no such distribution (all but Gumbel).
        """
        return self._codes(images, lambda quantizer, features: quantizer.sample(features))

    @torch.no_grad()
    def decode(self, codes: list[Tensor]) -> Tensor:
        left = iter(codes)

        def vectors_of(grid: int, context: Tensor | None) -> Tensor:
            quantizer = self._quantizers()[grid]
            return quantizer.vectors([next(left) for _ in quantizer.codebook_sizes])

        return output_to_images(self.config.reconstruction, self._decoded(vectors_of))

    def objective(self) -> VQVAEObjective:
        return VQVAEObjective(self)

    def _codes(self, images: Tensor, choose: Callable[[Quantizer, Tensor], list[Tensor]]) -> list[Tensor]:
        self._check_images(images)
        pyramid = self._pyramid(images)
        codes: list[Tensor] = []

        def codes_of(grid: int, context: Tensor | None) -> list[Tensor]:
            found = choose(self._quantizers()[grid], self._features(pyramid[grid], context))
            codes.extend(found)
            return found

        def vectors_of(grid: int, context: Tensor | None) -> Tensor:
            return self._quantizers()[grid].vectors(codes_of(grid, context))

        finest = len(self.quantizers) - 1
        codes_of(finest, self._walk(finest, vectors_of))  # whose vectors nobody needs
        return codes

    def _decoded(self, vectors_of: VectorsOf) -> Tensor:
        """The decoder's output for the vectors of all grids."""
        decoder, finest = self.decoder, len(self.quantizers) - 1
        assert isinstance(decoder, Decoder)
        x_BChw = self._decoder_input(finest, vectors_of, self._walk(finest, vectors_of))
        begin = self._resolution(finest)
        return self._pixels(lambda window: decoder.finish(window, begin), x_BChw, begin)

    def _walk(self, grids: int, vectors_of: VectorsOf) -> Tensor | None:
        """What the decoder makes of the `grids` coarsest grids, [B,C,h,w] at the resolution of the next one."""
        context: Tensor | None = None
        for grid in range(grids):
            context = self.decoder.resolutions[grid](self._decoder_input(grid, vectors_of, context))
        return context

    def _decoder_input(self, grid: int, vectors_of: VectorsOf, context: Tensor | None) -> Tensor:
        """Of the resolution of a grid, [B,C,h,w]. `context`: what the coarser grids decode to."""
        e_BDhw = self._grid(grid, vectors_of(grid, context))
        if context is None:
            x_BChw: Tensor = self.decoder.get_submodule("stem")(e_BDhw)
            return x_BChw
        return self._joined(context, self.expand[grid - 1](e_BDhw))

    def _joined(self, context_BChw: Tensor, e_BChw: Tensor) -> Tensor:
        """What the coarser grids decode to, with a finer one's part."""
        return context_BChw + e_BChw

    def _grid(self, grid: int, vectors_BND: Tensor) -> Tensor:
        """[B,D,h,w]."""
        return vectors_BND.transpose(1, 2).unflatten(2, self._grid_shape(grid))

    def _grid_shape(self, grid: int) -> tuple[int, int]:
        """Positions from top to bottom, and from left to right."""
        finer = 2 ** self._resolution(grid)
        return self.height // self.config.factor * finer, self.width // self.config.factor * finer

    def _quantizers(self) -> list[Quantizer]:
        return cast("list[Quantizer]", list(self.quantizers))

    def _pyramid(self, images_B3HW: Tensor) -> list[Tensor]:
        """The encoder's features, coarse to fine; in tiles, of the resolutions that have codes."""
        config = self.config
        if self._tile is None or isinstance(config, VQGANConfig | ViTConfig):
            return self._encoded(images_B3HW)
        margin = reach([config.block_reach] * len(config.widths), config.stem_reach)
        grids = len(self.quantizers)
        tile = self._tile // config.factor
        return by_tiles(lambda window: self._encoded(window)[:grids], images_B3HW, config.factor, tile, margin)

    def _pixels(self, decode: Callable[[Tensor], Tensor], x_BChw: Tensor, begin: int) -> Tensor:
        """What `decode` makes of the input of the decoder's resolution `begin`."""
        config = self.config
        if self._tile is None or isinstance(config, VQGANConfig | ViTConfig):
            return decode(x_BChw)
        margin = reach([config.block_reach] * (len(config.widths) - begin))
        tile = self._tile * x_BChw.shape[-1] // self.width
        [pixels] = by_tiles(lambda window: [decode(window)], x_BChw, 1, tile, margin)
        return pixels

    @property
    def _tile(self) -> int | None:
        """Pixels on a side of the tiles to work in; None: in one piece, as in training."""
        tile = self.config.tile_size
        return None if self.training or tile is None or tile >= max(self.height, self.width) else tile

    def _encoded(self, images_B3HW: Tensor) -> list[Tensor]:
        """The encoder's features of an image or a window of one, coarse to fine."""
        if self.config.channels_last:
            images_B3HW = images_B3HW.contiguous(memory_format=torch.channels_last)
        return self.encoder(images_B3HW)[::-1]

    def _features(self, h_BChw: Tensor, context: Tensor | None) -> Tensor:
        """What a grid is quantized from, [B,N,C], positions in row-major order."""
        both = h_BChw if context is None else torch.cat([h_BChw, context], dim=1)
        return both.flatten(2).transpose(1, 2)


class OneGrid(VQVAE):
    """A tokenizer whose decoder takes the vectors of the one grid, and is no stack of resolutions alone."""

    def _decoded(self, vectors_of: VectorsOf) -> Tensor:
        return self._pixels(self.decoder, self._grid(0, vectors_of(0, None)), 0)


class VQVAE2(VQVAE):
    """A VQ-VAE with a grid of codes at each of the two or three coarsest resolutions."""

    config_class = VQVAE2Config


class VQVAEObjective(TokenizerObjective):
    """Reconstruction plus what the quantizers ask for, per pixel value."""

    def __init__(self, tokenizer: VQVAE) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.reconstruction = ReconstructionLoss(tokenizer.config.reconstruction)
        self._step_means: list[StepMean] = []
        self._step_noises: list[StepNoise] = []
        for grid, quantizer in enumerate(tokenizer._quantizers()):
            if quantizer.asks_for_even_use:
                quantizer.step_mean = mean = StepMean()  # no part of the tokenizer
                self._step_means.append(mean)
            if quantizer.draws:
                # The seed that the run's models are built from, equal on all ranks.
                quantizer.uniform = noise = StepNoise("uniform", torch.initial_seed(), grid)
                self._step_noises.append(noise)

    def forward(self, batch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """`batch`: images, uint8 [b,3,H,W]."""
        images = batch["images"].float() / 255
        output, found = self.tokenizer(images, step)
        loss, metrics = self.reconstruction(images, output, step)
        for i, quantized in enumerate(found):
            suffix = f"_{i}" if len(found) > 1 else ""
            loss = loss + quantized.loss
            metrics |= {f"{name}{suffix}": value for name, value in quantized.metrics.items()}
            metrics[f"quantizer_loss{suffix}"] = quantized.loss.detach()
        return loss, metrics

    def exported(self) -> Exported:
        return Exported("tokenizer.", self.tokenizer.exported_config())

    def blocks(self) -> list[nn.Module]:
        """The residual blocks of encoder and decoder."""
        halves = self.tokenizer.halves()
        stacks = [resolution.get_submodule("blocks") for half in halves for resolution in half.resolutions]
        return [block for stack in stacks for block in stack.children()]

    def tables(self) -> list[nn.Parameter]:
        codebooks = [book for quantizer in self.tokenizer._quantizers() for book in quantizer.learned_codebooks()]
        return codebooks + self.tokenizer.positions()

    def averaged_buffers(self) -> dict[str, Tensor]:
        learned = {id(book) for quantizer in self.tokenizer._quantizers() for book in quantizer.averaged_codebooks()}
        return {name: buffer for name, buffer in self.named_buffers() if id(buffer) in learned}

    def after_update(self, applied: bool | Tensor) -> None:
        """Codebooks of moving averages learn once per update, after it."""
        for quantizer in self.tokenizer._quantizers():
            quantizer.after_update(applied)
        for mean in self._step_means:
            mean.forget()
        for noise in self._step_noises:
            noise.forget()

    def look_ahead(self, micro_batches: Sequence[dict[str, Tensor]], step: int) -> None:
        """How many images a step has, and how evenly it uses its codes, where a quantizer asks for that."""
        images = sum(len(batch["images"]) for batch in micro_batches)
        for noise in self._step_noises:
            noise.expect(images)
        if not self._step_means:
            return
        for mean in self._step_means:
            mean.look_ahead()
        device = micro_batches[0]["images"].device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            for batch in micro_batches:
                self.tokenizer.quantize(batch["images"].float() / 255, step)
        for quantizer in self.tokenizer._quantizers():
            quantizer.forget()
        for noise in self._step_noises:
            noise.expect(images)
        for mean in self._step_means:
            mean.settle()
