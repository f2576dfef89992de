"""The VQGAN's encoder and decoder: Esser et al. 2021, "Taming Transformers", section 3.1 and appendix (table 7).

    image → stem → [blocks, with attention at some resolutions → down] … → middle → norm, swish, head → features
    vectors → project → stem → middle → [blocks, with attention → up] … → norm, swish, head → image

A block is norm, swish, 3×3 convolution, twice, beside its input. Norms are over 32 groups, with ε = 1e-6. Going down
is a convolution of stride 2 with a row and a column of zeros below and to the right alone; going up repeats pixels
and convolves. The middle is a block, attention, a block. Published weights fit into it: pretrained/.

With `spatial_norm` the codes' vectors scale and shift what the decoder normalizes, at every layer: Zheng et al. 2022,
"MoVQ", section 3.2. With `frames` there are layers of a tokenizer of videos behind the encoder and before the decoder:
still_image.py.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config.image_tokenizer_model import VQGANConfig
from pipeline.image_tokenizer.architecture import DecoderHalf, EncoderHalf
from pipeline.image_tokenizer.still_image import FirstFrame, StillImage
from pipeline.image_tokenizer.vqvae import OneGrid

GROUPS = 32


class Norm(nn.GroupNorm):
    """[B,C,h,w] -> [B,C,h,w]. It asks for no codes, and takes them as `SpatialNorm` does."""

    def __init__(self, width: int) -> None:
        super().__init__(GROUPS, width, eps=1e-6)

    def forward(self, x_BChw: Tensor, codes_BDss: Tensor | None = None) -> Tensor:
        return super().forward(x_BChw)


class SpatialNorm(nn.Module):
    """norm(x) · scale(codes) + shift(codes), the codes' vectors enlarged to x's positions."""

    def __init__(self, width: int, code_width: int) -> None:
        super().__init__()
        self.norm = Norm(width)
        self.scale, self.shift = nn.Conv2d(code_width, width, 1), nn.Conv2d(code_width, width, 1)

    def forward(self, x_BChw: Tensor, codes_BDss: Tensor) -> Tensor:
        codes = F.interpolate(codes_BDss, size=x_BChw.shape[-2:], mode="nearest")
        out: Tensor = self.norm(x_BChw) * self.scale(codes) + self.shift(codes)
        return out


def norm(width: int, code_width: int | None) -> nn.Module:
    """A spatial one where there are codes, of `code_width` channels."""
    return Norm(width) if code_width is None else SpatialNorm(width, code_width)


class Block(nn.Module):
    """[B,in_width,h,w] -> [B,width,h,w]."""

    def __init__(self, in_width: int, width: int, code_width: int | None) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm(in_width, code_width), nn.Conv2d(in_width, width, 3, padding=1)
        self.norm2, self.conv2 = norm(width, code_width), nn.Conv2d(width, width, 3, padding=1)
        self.shortcut: nn.Module = nn.Conv2d(in_width, width, 1) if in_width != width else nn.Identity()

    def forward(self, x_BChw: Tensor, codes_BDss: Tensor | None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x_BChw, codes_BDss)))
        out: Tensor = self.shortcut(x_BChw) + self.conv2(F.silu(self.norm2(h, codes_BDss)))
        return out


class Attention(nn.Module):
    """Each position sees all, one head of all channels, beside its input: [B,C,h,w] -> [B,C,h,w]."""

    def __init__(self, width: int, code_width: int | None) -> None:
        super().__init__()
        self.norm = norm(width, code_width)
        self.q, self.k, self.v, self.out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x_BChw: Tensor, codes_BDss: Tensor | None) -> Tensor:
        h = self.norm(x_BChw, codes_BDss)
        # [B,1,N,C]: without the dimension of heads no kernel is taken that does without all scores, [N,N].
        q, k, v = (part(h).flatten(2).transpose(1, 2)[:, None] for part in (self.q, self.k, self.v))
        seen = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(x_BChw.shape)
        out: Tensor = x_BChw + self.out(seen)
        return out


class Middle(nn.Module):
    """At the coarsest resolution, in both halves."""

    def __init__(self, width: int, code_width: int | None) -> None:
        super().__init__()
        self.before, self.attention = Block(width, width, code_width), Attention(width, code_width)
        self.after = Block(width, width, code_width)

    def forward(self, x_BChw: Tensor, codes_BDss: Tensor | None) -> Tensor:
        x = self.attention(self.before(x_BChw, codes_BDss), codes_BDss)
        out: Tensor = self.after(x, codes_BDss)
        return out


class Down(nn.Module):
    """[B,C,2h,2w] -> [B,C,h,w]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x_BChw: Tensor) -> Tensor:
        out: Tensor = self.conv(F.pad(x_BChw, (0, 1, 0, 1)))
        return out


class Up(nn.Module):
    """[B,C,h,w] -> [B,C,2h,2w]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x_BChw: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x_BChw, scale_factor=2.0, mode="nearest"))
        return out


class Resolution(nn.Module):
    """`blocks`, each followed by attention where there is one, then `to_next`: down, up or nothing."""

    def __init__(
        self, in_width: int, width: int, blocks: int, attention: bool, to_next: nn.Module, code_width: int | None = None
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width if i else in_width, width, code_width) for i in range(blocks))
        self.attentions = nn.ModuleList(Attention(width, code_width) for _ in range(blocks if attention else 0))
        self.to_next = to_next

    def forward(self, x_BChw: Tensor, codes_BDss: Tensor | None = None) -> Tensor:
        for i, block in enumerate(self.blocks):
            x_BChw = block(x_BChw, codes_BDss)
            if len(self.attentions):
                x_BChw = self.attentions[i](x_BChw, codes_BDss)
        out: Tensor = self.to_next(x_BChw)
        return out


class Encoder(EncoderHalf):
    """Images [B,3,H,W] in [0,1] -> a list of one: features [B,latent_width,h,w]."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        widths = config.channels_of_resolutions
        last = len(widths) - 1
        self.stem = nn.Conv2d(3, config.channels, 3, padding=1)
        self.resolutions = nn.ModuleList()
        for i, (finer, width) in enumerate(zip((config.channels, *widths), widths, strict=False)):
            to_next = Down(width) if i < last else nn.Identity()
            self.resolutions.append(Resolution(finer, width, config.blocks, i in config.attention, to_next))
        self.middle, self.norm = Middle(widths[-1], None), Norm(widths[-1])
        self.head = nn.Conv2d(widths[-1], config.latent_width, 3, padding=1)
        self.time = StillImage(config.latent_width, config.frames, config.blocks) if config.frames else nn.Identity()

    def forward(self, images_B3HW: Tensor) -> list[Tensor]:
        x = self.stem(2 * images_B3HW - 1)
        for resolution in self.resolutions:
            x = resolution(x)
        return [self.time(self.head(F.silu(self.norm(self.middle(x, None)))))]


class Stem(nn.Module):
    """Vectors [B,D,h,w] -> [B,C,h,w], of the coarsest resolution."""

    def __init__(self, config: VQGANConfig, code_width: int, width: int, spatial: int | None) -> None:
        super().__init__()
        latent = config.latent_width
        self.project = nn.Conv2d(code_width, latent, 1)
        self.time = FirstFrame(latent, config.frames, config.blocks) if config.frames else nn.Identity()
        self.conv = nn.Conv2d(latent, width, 3, padding=1)
        self.middle = Middle(width, spatial)

    def forward(self, z_BDhw: Tensor, codes_BDhw: Tensor | None) -> Tensor:
        out: Tensor = self.middle(self.conv(self.time(self.project(z_BDhw))), codes_BDhw)
        return out


class Decoder(DecoderHalf):
    """Vectors [B,D,h,w] -> pixels, float32 [B,3,H,W], in [0,1] but for errors. `resolutions` go from coarse to fine."""

    def __init__(self, config: VQGANConfig, code_width: int) -> None:
        super().__init__()
        widths = config.channels_of_resolutions[::-1]
        last = len(widths) - 1
        self.spatial = code_width if config.spatial_norm else None
        self.stem = Stem(config, code_width, widths[0], self.spatial)
        self.resolutions = nn.ModuleList()
        for i, (coarser, width) in enumerate(zip((widths[0], *widths), widths, strict=False)):
            to_next, attention = Up(width) if i < last else nn.Identity(), last - i in config.attention
            self.resolutions.append(Resolution(coarser, width, config.blocks + 1, attention, to_next, self.spatial))
        self.norm, self.head = norm(widths[-1], self.spatial), nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, z_BDhw: Tensor) -> Tensor:
        codes = None if self.spatial is None else self.stem.time(z_BDhw)
        x_BChw = self.stem(z_BDhw, codes)
        for resolution in self.resolutions:
            x_BChw = resolution(x_BChw, codes)
        pixels: Tensor = self.head(F.silu(self.norm(x_BChw, codes))).float()
        return (pixels + 1) / 2


class VQGAN(OneGrid):
    """One grid of codes, between the VQGAN's halves; the adversarial loss is the section's `adversarial`."""

    config_class = VQGANConfig

    def _new_encoder(self) -> EncoderHalf:
        assert isinstance(self.config, VQGANConfig)
        return Encoder(self.config)

    def _new_decoder(self, code_width: int) -> DecoderHalf:
        assert isinstance(self.config, VQGANConfig)
        return Decoder(self.config, code_width)
