"""A vision transformer as encoder and decoder: Yu et al. 2022, "Vector-quantized Image Modeling", section 3.1.

    image → patches → stem, positions → blocks → norm → features
    vectors → stem, positions → blocks → norm → head → patches → image

A block is attention among all positions and an MLP (Dosovitskiy et al. 2021, section 3.1), each behind a norm and
beside its input. Departures from the ViT-VQGAN: features and pixels come from one linear layer behind the last norm,
where the paper has two with a tanh between; the loss is the section's own, with its optional perceptual and adversarial
terms.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config.image_tokenizer_model import ViTConfig
from pipeline.image_tokenizer.architecture import DecoderHalf, EncoderHalf, conv
from pipeline.image_tokenizer.losses import output_channels
from pipeline.image_tokenizer.vqvae import OneGrid

_POSITION_STD = 0.5  # beside features of variance 1


class Block(nn.Module):
    """[B,N,D] -> [B,N,D]. The last layers of attention and MLP begin at zero, so a new block changes nothing."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        width, hidden = config.width, config.hidden
        self.heads = config.heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.attention_out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.mlp_in, self.mlp_out = nn.Linear(width, hidden), nn.Linear(hidden, width)
        for layer in (self.qkv, self.mlp_in):
            nn.init.normal_(layer.weight, std=width**-0.5)
        for layer in (self.attention_out, self.mlp_out):
            nn.init.zeros_(layer.weight)
        for layer in (self.mlp_in, self.mlp_out):
            nn.init.zeros_(layer.bias)

    def forward(self, x_BND: Tensor) -> Tensor:
        qkv = self.qkv(self.attention_norm(x_BND)).unflatten(2, (3, self.heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # [B,H,N,D/H] each
        seen = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        x_BND = x_BND + self.attention_out(seen)
        out: Tensor = x_BND + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x_BND))))
        return out


class Resolution(nn.Module):
    """`blocks` over a grid of positions, each of which has a vector of its own, then a norm: [B,D,h,w] -> [B,D,h,w]."""

    def __init__(self, config: ViTConfig, grid: tuple[int, int]) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.empty(config.width, *grid))
        nn.init.normal_(self.positions, std=_POSITION_STD)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)

    def forward(self, x_BDhw: Tensor) -> Tensor:
        x_BND = (x_BDhw + self.positions).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x_BND = block(x_BND)
        out: Tensor = self.norm(x_BND).transpose(1, 2).unflatten(2, x_BDhw.shape[2:])
        return out


class Encoder(EncoderHalf):
    """Images [B,3,H,W] in [0,1] -> a list of one: features [B,D,h,w]."""

    def __init__(self, config: ViTConfig, grid: tuple[int, int]) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.stem = conv(3 * config.patch_size**2, config.width, 1)
        self.resolutions = nn.ModuleList([Resolution(config, grid)])

    def forward(self, images_B3HW: Tensor) -> list[Tensor]:
        return [self.resolutions[0](self.stem(F.pixel_unshuffle(2 * images_B3HW - 1, self.patch_size)))]


class Decoder(DecoderHalf):
    """Vectors [B,d,h,w] -> parameters of the pixels' distribution, float32 [B,6,H,W] (μ, ln b) or [B,3,H,W]."""

    def __init__(self, config: ViTConfig, code_width: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.stem = conv(code_width, config.width, 1)
        self.resolutions = nn.ModuleList([Resolution(config, grid)])
        self.head = conv(config.width, output_channels(config.reconstruction) * config.patch_size**2, 1)

    def forward(self, z_Bdhw: Tensor) -> Tensor:
        x_BDhw = self.resolutions[0](self.stem(z_Bdhw))
        return F.pixel_shuffle(self.head(x_BDhw).float(), self.patch_size)


class ViT(OneGrid):
    """One grid of codes, a code a patch, between the vision transformer's halves."""

    config_class = ViTConfig

    def _new_encoder(self) -> EncoderHalf:
        assert isinstance(self.config, ViTConfig)
        return Encoder(self.config, self._grid_shape(0))

    def _new_decoder(self, code_width: int) -> DecoderHalf:
        assert isinstance(self.config, ViTConfig)
        return Decoder(self.config, code_width, self._grid_shape(0))

    def positions(self) -> list[nn.Parameter]:
        return [half.resolutions[0].get_parameter("positions") for half in self.halves()]
