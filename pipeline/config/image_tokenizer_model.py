"""Key `image_tokenizer.model` of the pipeline config: the kinds of image tokenizers.

The defaults of `DVAEConfig` are those of Ramesh et al. 2021; the files in `configs/` choose smaller ones.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.config.base import Config, added
from pipeline.config.ode import OdeConfig
from pipeline.config.quantizers import CodebookConfig, GumbelConfig, GumbelSettings, QuantizerConfig

_TILE_SIZE = added(
    None,
    ge=1,
    description="pixels on a side of the tiles in which larger images are encoded and decoded, with what surrounds"
    " them: less memory, the same result but for rounding. null: in one piece",
)


class ArchitectureConfig(Config):
    """The encoder and decoder of all kinds, and the loss between an image and its reconstruction.

    The image is downsampled by `patch_size * 2 ** (len(widths) - 1)` on each side.
    """

    patch_size: int = Field(1, ge=1, description="pixels of a patch's side that become one position before any layer")
    widths: tuple[int, ...] = Field(
        (256, 512, 1024, 2048),
        min_length=1,
        description="channels per resolution, fine to coarse; each next one halves",
    )
    blocks: int = Field(2, ge=1, description="residual blocks per resolution, in encoder and decoder alike")
    block_kernels: tuple[int, ...] = Field((3, 3, 3, 1), min_length=1, description="convolutions of a residual block")
    bottleneck: int = Field(4, ge=1, description="a block's inner width is its width divided by this")
    block: Literal["residual", "ode"] = Field(
        "residual", description="ode: the blocks of a resolution as one of continuous depth, with as many parameters"
    )
    ode: OdeConfig = Field(OdeConfig(), description="how `block: ode` is solved")
    stem_kernel: int = Field(7, ge=1, description="kernel of the encoder's first convolution")
    reconstruction: Literal["logit_laplace", "l1", "l2"] = Field(
        "logit_laplace", description="loss between an image and its reconstruction; logit_laplace: Ramesh et al. 2021"
    )
    tile_size: int | None = _TILE_SIZE

    @property
    def block_reach(self) -> int:
        """Positions that the blocks of a resolution see on each side of their own."""
        return self.blocks * sum(kernel // 2 for kernel in self.block_kernels)

    @property
    def stem_reach(self) -> int:
        """The same of the encoder's first convolution."""
        return self.stem_kernel // 2

    @property
    def factor(self) -> int:
        """Pixels along the side of the square that one code of the coarsest level stands for."""
        return self.patch_size << (len(self.widths) - 1)

    @model_validator(mode="after")
    def _check_architecture(self) -> ArchitectureConfig:
        if min(self.widths) < 1 or any(width % self.bottleneck for width in self.widths):
            raise ValueError(f"widths {list(self.widths)} must be positive multiples of bottleneck ({self.bottleneck})")
        if any(kernel < 1 or kernel % 2 == 0 for kernel in (*self.block_kernels, self.stem_kernel)):
            raise ValueError("block_kernels and stem_kernel must be odd, so that a layer keeps the image's size")
        if self.tile_size is not None and self.block == "ode":
            raise ValueError("tile_size is for `block: residual`: what solvers see depends on their steps")
        _check_tiles(self.tile_size, self.factor)
        return self


def _check_tiles(tile_size: int | None, factor: int) -> None:
    if tile_size is not None and tile_size % factor:
        raise ValueError(f"tile_size must be a multiple of {factor}, the pixels of a code's side; found {tile_size}")


def _gumbel(settings: GumbelSettings) -> GumbelConfig:
    return GumbelConfig(kind="gumbel", **{name: getattr(settings, name) for name in GumbelSettings.model_fields})


class DVAEConfig(GumbelSettings, ArchitectureConfig):
    """The discrete VAE of Ramesh et al. 2021 (section 2.1, appendix A): the VQ-VAE with the Gumbel quantizer.

    The defaults of both parts are the paper's.
    """

    kind: Literal["dvae"] = "dvae"
    channels_last: bool = added(
        False,
        description="memory layout of the convolutions: faster on a CPU, other bits; false: as runs so far",
    )

    @property
    def quantizers(self) -> tuple[QuantizerConfig, ...]:
        """Its one grid's quantizer."""
        return (_gumbel(self),)


class OpenAIDVAEConfig(GumbelSettings):
    """The discrete VAE that OpenAI published (package `dall_e`), block by block; the defaults are its sizes."""

    kind: Literal["openai-dvae"]
    widths: tuple[int, ...] = Field(
        (256, 512, 1024, 2048),
        min_length=1,
        description="channels per resolution, fine to coarse; each next one halves",
    )
    blocks: int = Field(2, ge=1, description="residual blocks per resolution, in encoder and decoder alike")
    channels_last: bool = Field(True, description="memory layout of the convolutions")
    reconstruction: Literal["logit_laplace"] = Field(
        "logit_laplace", description="loss between an image and its reconstruction (Ramesh et al. 2021)"
    )
    tile_size: int | None = _TILE_SIZE

    @property
    def factor(self) -> int:
        """Pixels along the side of the square that one code stands for."""
        return 1 << (len(self.widths) - 1)

    @property
    def block_reach(self) -> int:
        """Positions that the blocks of a resolution, of three 3×3 convolutions each, see on each side of their own."""
        return 3 * self.blocks

    @property
    def stem_reach(self) -> int:
        """The same of the encoder's first convolution, 7×7."""
        return 3

    @property
    def quantizers(self) -> tuple[QuantizerConfig, ...]:
        """Its one grid's quantizer."""
        return (_gumbel(self),)

    @model_validator(mode="after")
    def _check(self) -> OpenAIDVAEConfig:
        if min(self.widths) < 4 or any(width % 4 for width in self.widths):
            raise ValueError(f"widths must be positive multiples of 4; found {list(self.widths)}")
        _check_tiles(self.tile_size, self.factor)
        return self


class VQVAEConfig(ArchitectureConfig):
    """The VQ-VAE of van den Oord et al. 2017, with any quantizer: one grid of positions at the coarsest resolution."""

    kind: Literal["vqvae"]
    quantizer: QuantizerConfig = CodebookConfig(kind="ema")
    channels_last: bool = Field(True, description="memory layout of the convolutions; on a CPU 1.3 times as fast")
    reconstruction: Literal["logit_laplace", "l1", "l2"] = "l2"

    @property
    def quantizers(self) -> tuple[QuantizerConfig, ...]:
        """Its one grid's quantizer."""
        return (self.quantizer,)


class VQVAE2Config(ArchitectureConfig):
    """The VQ-VAE-2 of Razavi et al. 2019: a grid of codes at each of the two or three coarsest resolutions."""

    kind: Literal["vqvae2"]
    quantizers: tuple[QuantizerConfig, ...] = Field(
        (CodebookConfig(kind="ema"), CodebookConfig(kind="ema")),
        min_length=2,
        max_length=3,
        description="a quantizer per grid, coarse to fine; each next one has twice the positions on a side",
    )
    channels_last: bool = Field(True, description="memory layout of the convolutions; on a CPU 1.3 times as fast")
    reconstruction: Literal["logit_laplace", "l1", "l2"] = "l2"

    @model_validator(mode="after")
    def _check_levels(self) -> VQVAE2Config:
        if len(self.quantizers) > len(self.widths):
            raise ValueError(
                f"{len(self.quantizers)} quantizers need as many resolutions: widths has {len(self.widths)} entries"
            )
        return self


class ColorFormConfig(ArchitectureConfig):
    """Two codes a position, one of color and one of form: for flat drawings, whose parts have one color each."""

    kind: Literal["color-form"]
    color: QuantizerConfig = Field(
        CodebookConfig(kind="ema", codebook_size=16), description="of the color of each position's darkest pixel"
    )
    form: QuantizerConfig = Field(CodebookConfig(kind="ema"), description="of how dark each pixel is, no color")
    relative_form: bool = added(
        False, description="how dark beside the darkest pixel of its position: the same in every color, on white"
    )
    channels_last: bool = Field(True, description="memory layout of the convolutions; on a CPU 1.3 times as fast")
    reconstruction: Literal["logit_laplace", "l1", "l2"] = "l2"

    @property
    def quantizers(self) -> tuple[QuantizerConfig, ...]:
        """Those of its two grids."""
        return (self.color, self.form)


class VQGANConfig(Config):
    """The architecture of Esser et al. 2021, with any quantizer: one grid of positions at the coarsest resolution.

    The image is downsampled by `2 ** (len(multipliers) - 1)` on each side.
    LlamaGen's VQ-16 is the defaults with attention [4].
    """

    kind: Literal["vqgan"]
    channels: int = Field(128, ge=32, multiple_of=32, description="of the first layer; norms have 32 groups")
    multipliers: tuple[int, ...] = Field(
        (1, 1, 2, 2, 4), min_length=1, description="channels per resolution as multiples of `channels`, fine to coarse"
    )
    blocks: int = Field(2, ge=1, description="residual blocks per resolution; the decoder has one more")
    attention: tuple[int, ...] = Field(
        (), description="resolutions with attention behind each block; 0 is the finest. The middle always has it"
    )
    latent_width: int = Field(256, ge=1, description="channels between the halves and the quantizer")
    spatial_norm: bool = added(
        False, description="the codes' vectors scale and shift what the decoder normalizes (MoVQ: Zheng et al. 2022)"
    )
    frames: int = added(
        0,
        ge=0,
        description="of a tokenizer of videos (Emu3's), which sees an image as so many equal frames; 0: of images",
    )
    quantizer: QuantizerConfig = CodebookConfig(kind="gradient", codebook_size=16384, code_width=8, normalize=True)
    channels_last: bool = Field(True, description="memory layout of the convolutions")
    reconstruction: Literal["l1", "l2"] = Field("l2", description="loss between an image and its reconstruction")

    @property
    def factor(self) -> int:
        """Pixels along the side of the square that one code stands for."""
        return 1 << (len(self.multipliers) - 1)

    @property
    def tile_size(self) -> None:
        """None, and no key: its norms and attention see the whole image."""
        return None

    @property
    def channels_of_resolutions(self) -> tuple[int, ...]:
        """Fine to coarse."""
        return tuple(self.channels * multiplier for multiplier in self.multipliers)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of what the encoder gives: features of one resolution alone."""
        return (self.latent_width,)

    @property
    def quantizers(self) -> tuple[QuantizerConfig, ...]:
        """Its one grid's quantizer."""
        return (self.quantizer,)

    @model_validator(mode="after")
    def _check(self) -> VQGANConfig:
        if min(self.multipliers) < 1:
            raise ValueError(f"multipliers must be 1 or more; found {list(self.multipliers)}")
        if wrong := [i for i in self.attention if not 0 <= i < len(self.multipliers)]:
            raise ValueError(f"attention must name resolutions 0 to {len(self.multipliers) - 1}; found {wrong[0]}")
        if self.frames & (self.frames - 1):
            raise ValueError(f"frames must be 0 or a power of 2; found {self.frames}")
        return self


class ViTConfig(Config):
    """The ViT-VQGAN of Yu et al. 2022 (section 3.1): transformer blocks over patches, a code each.

    The defaults are those of its small model.
    """

    kind: Literal["vit"]
    patch_size: int = Field(8, ge=1, description="pixels of a patch's side; a code stands for a patch")
    width: int = Field(512, ge=1, description="channels of a position")
    layers: int = Field(8, ge=1, description="blocks of attention and MLP, in encoder and decoder alike")
    heads: int = Field(8, ge=1, description="attention heads; must divide width")
    mlp_width: int | None = Field(None, ge=1, description="hidden width; null: 4 width")
    quantizer: QuantizerConfig = CodebookConfig(kind="gradient", codebook_size=8192, code_width=32, normalize=True)
    reconstruction: Literal["logit_laplace", "l1", "l2"] = Field(
        "l2", description="loss between an image and its reconstruction"
    )

    @property
    def factor(self) -> int:
        """Pixels along the side of the square that one code stands for."""
        return self.patch_size

    @property
    def tile_size(self) -> None:
        """None, and no key: its attention sees the whole image."""
        return None

    @property
    def channels_last(self) -> bool:
        """False, and no key: its convolutions are matrices."""
        return False

    @property
    def hidden(self) -> int:
        """Channels inside of an MLP."""
        return self.mlp_width or 4 * self.width

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of what the encoder gives: features of one resolution alone."""
        return (self.width,)

    @property
    def quantizers(self) -> tuple[QuantizerConfig, ...]:
        """Its one grid's quantizer."""
        return (self.quantizer,)

    @model_validator(mode="after")
    def _check(self) -> ViTConfig:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}; choose heads that divide it")
        return self


ModelConfig = Annotated[
    DVAEConfig | VQVAEConfig | VQVAE2Config | ColorFormConfig | VQGANConfig | OpenAIDVAEConfig | ViTConfig,
    Field(discriminator="kind"),
]
