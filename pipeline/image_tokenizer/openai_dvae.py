"""The discrete VAE that OpenAI published with DALL-E (package `dall_e`, 2021), so that its weights fit: pretrained/.

    image → shrink pixels → stem → blocks → pool → blocks → … → ReLU → logits, 1×1
    one-hot code → vector → blocks → twice the size → blocks → … → ReLU → head, 1×1 → (μ, ln b)

In what it differs from `kind: dvae` (architecture.py), which follows the text of the paper: where channels change, the
first block of a resolution has a 1×1 convolution beside it, and none stands between the resolutions; the decoder's
blocks have kernels 1, 3, 3, 3 where the encoder's have 3, 3, 3, 1; the encoder sees pixels as the likelihood does, in
[ε, 1 − ε]; a code's vector goes into the decoder's blocks as it is.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config.image_tokenizer_model import OpenAIDVAEConfig
from pipeline.image_tokenizer.architecture import DecoderHalf, EncoderHalf, conv
from pipeline.image_tokenizer.losses import map_pixels
from pipeline.image_tokenizer.vqvae import OneGrid

_KERNELS = (3, 3, 3, 1)  # of an encoder's block; a decoder's has them the other way


class Block(nn.Module):
    """shortcut(x) + gain · (four convolutions, each after a ReLU): [B,in_width,h,w] -> [B,width,h,w]."""

    def __init__(self, in_width: int, width: int, kernels: tuple[int, ...], gain: float) -> None:
        super().__init__()
        widths = (in_width, width // 4, width // 4, width // 4, width)
        layers: list[nn.Module] = []
        for i, kernel in enumerate(kernels):
            layers += [nn.ReLU(), conv(widths[i], widths[i + 1], kernel)]
        self.branch = nn.Sequential(*layers)
        self.shortcut: nn.Module = conv(in_width, width, 1) if in_width != width else nn.Identity()
        self.gain = gain

    def forward(self, x_BChw: Tensor) -> Tensor:
        out: Tensor = self.shortcut(x_BChw) + self.gain * self.branch(x_BChw)
        return out


class Resolution(nn.Module):
    """`from_last` resolution (pool, or twice the size), where there is one, then `blocks`."""

    def __init__(
        self, in_width: int, width: int, config: OpenAIDVAEConfig, from_last: nn.Module, kernels: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.from_last = from_last
        gain = 1 / (len(config.widths) * config.blocks) ** 2
        self.blocks = nn.ModuleList(Block(width if i else in_width, width, kernels, gain) for i in range(config.blocks))

    def forward(self, x: Tensor) -> Tensor:
        x = self.from_last(x)
        for block in self.blocks:
            x = block(x)
        return x


class Encoder(EncoderHalf):
    """Images [B,3,H,W] in [0,1] -> a list of one: features [B,C,h,w], after a ReLU."""

    def __init__(self, config: OpenAIDVAEConfig) -> None:
        super().__init__()
        widths = config.widths
        self.stem = conv(3, widths[0], 7)
        self.resolutions = nn.ModuleList()
        for i, width in enumerate(widths):
            pool = nn.MaxPool2d(2) if i else nn.Identity()
            self.resolutions.append(Resolution(widths[max(i - 1, 0)], width, config, pool, _KERNELS))

    def forward(self, images_B3HW: Tensor) -> list[Tensor]:
        x = self.stem(map_pixels(images_B3HW))
        for resolution in self.resolutions:
            x = resolution(x)
        return [F.relu(x)]


class Decoder(DecoderHalf):
    """Vectors [B,D,h,w] -> parameters of the pixels' distribution, float32 [B,6,H,W] (μ, ln b)."""

    def __init__(self, config: OpenAIDVAEConfig, code_width: int) -> None:
        super().__init__()
        widths = config.widths[::-1]
        self.resolutions = nn.ModuleList()
        for i, width in enumerate(widths):
            up = nn.Upsample(scale_factor=2, mode="nearest") if i else nn.Identity()
            in_width = widths[i - 1] if i else code_width
            self.resolutions.append(Resolution(in_width, width, config, up, _KERNELS[::-1]))
        self.head = conv(widths[-1], 6, 1)

    def forward(self, z_BDhw: Tensor) -> Tensor:
        x_BChw = z_BDhw
        for resolution in self.resolutions:
            x_BChw = resolution(x_BChw)
        out: Tensor = self.head(F.relu(x_BChw)).float()
        return out


class OpenAIDVAE(OneGrid):
    """One grid of codes with the Gumbel quantizer, between OpenAI's halves."""

    config_class = OpenAIDVAEConfig

    def _new_encoder(self) -> EncoderHalf:
        assert isinstance(self.config, OpenAIDVAEConfig)
        return Encoder(self.config)

    def _new_decoder(self, code_width: int) -> DecoderHalf:
        assert isinstance(self.config, OpenAIDVAEConfig)
        return Decoder(self.config, code_width)
