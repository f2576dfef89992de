"""The one encoder and decoder that all kinds of tokenizer share: images to features, vectors of codes to images.

    image → fold patches into channels → stem → blocks → down → blocks → … → features at each resolution
    vectors → stem → blocks → up → blocks → … → head → unfold patches

As in Ramesh et al. 2021 (appendix A): residual blocks whose branch is scaled down, max-pooling down, nearest neighbour
up, 1×1 convolutions at the bottleneck. `patch_size` is ours: folding pixels into channels first leaves no layer at the
full resolution, where a small machine would spend most of its time.

`residual_stack` makes the blocks of one resolution, or their continuous counterpart (`ode.py`).
"""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config.image_tokenizer_model import ArchitectureConfig
from pipeline.image_tokenizer.losses import output_channels


class ResidualBlock(nn.Module):
    """x + gain · (convolutions, each after a ReLU): the paper's bottleneck block, with its small constant."""

    def __init__(self, width: int, config: ArchitectureConfig, gain: float) -> None:
        super().__init__()
        inner = width // config.bottleneck
        layers: list[nn.Module] = []
        last = len(config.block_kernels) - 1
        for i, kernel in enumerate(config.block_kernels):
            in_width, out_width = (width if i == 0 else inner), (width if i == last else inner)
            layers += [nn.ReLU(), conv(in_width, out_width, kernel)]
        self.branch = nn.Sequential(*layers)
        self.gain = gain

    def forward(self, x_BCHW: Tensor) -> Tensor:
        out: Tensor = x_BCHW + self.gain * self.branch(x_BCHW)
        return out


def residual_stack(width: int, config: ArchitectureConfig) -> nn.ModuleList:
    """The blocks of one resolution, [B,width,h,w] -> [B,width,h,w], one after the other."""
    gain = 1 / (len(config.widths) * config.blocks) ** 2
    blocks = [ResidualBlock(width, config, gain) for _ in range(config.blocks)]
    if config.block == "ode":
        from pipeline.image_tokenizer.ode import OdeStack  # its library loads scipy: half a second

        return nn.ModuleList([OdeStack([block.branch for block in blocks], gain, config.ode)])
    return nn.ModuleList(blocks)


class EncoderResolution(nn.Module):
    """One resolution of the encoder: `down` from the finer one [B,C',2h,2w], if there is one, then `blocks`."""

    def __init__(self, finer_width: int | None, width: int, config: ArchitectureConfig) -> None:
        super().__init__()
        self.down: nn.Module = nn.Identity()
        if finer_width is not None:
            self.down = nn.Sequential(OrderedDict(pool=nn.MaxPool2d(2), conv=conv(finer_width, width, 1)))
        self.blocks = residual_stack(width, config)

    def forward(self, x: Tensor) -> Tensor:
        """-> [B,width,h,w]."""
        x = self.down(x)
        for block in self.blocks:
            x = block(x)
        return x


class EncoderHalf(nn.Module):
    """What every encoder has. `resolutions` go from fine to coarse, each with its `blocks`."""

    resolutions: nn.ModuleList


class DecoderHalf(nn.Module):
    """What every decoder has. `resolutions` go from coarse to fine, each with its `blocks`."""

    resolutions: nn.ModuleList


class Encoder(EncoderHalf):
    """Images [B,3,H,W] in [0,1] -> features [B,C,h,w] of each resolution, fine to coarse, after a ReLU."""

    def __init__(self, config: ArchitectureConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.stem = conv(3 * config.patch_size**2, config.widths[0], config.stem_kernel)
        finer = (None, *config.widths)
        self.resolutions = nn.ModuleList(EncoderResolution(finer[i], w, config) for i, w in enumerate(config.widths))

    def forward(self, images_B3HW: Tensor) -> list[Tensor]:
        x = self.stem(F.pixel_unshuffle(2 * images_B3HW - 1, self.patch_size))
        features = []
        for resolution in self.resolutions:
            x = resolution(x)
            features.append(F.relu(x))
        return features


class DecoderResolution(nn.Module):
    """One resolution of the decoder: `blocks`, then `up` to the finer one [B,C',2h,2w], if there is one."""

    def __init__(self, width: int, finer_width: int | None, config: ArchitectureConfig) -> None:
        super().__init__()
        self.blocks = residual_stack(width, config)
        self.up: nn.Module = nn.Identity()
        if finer_width is not None:
            upsample = nn.Upsample(scale_factor=2, mode="nearest")
            self.up = nn.Sequential(OrderedDict(upsample=upsample, conv=conv(width, finer_width, 1)))

    def forward(self, x_BChw: Tensor) -> Tensor:
        for block in self.blocks:
            x_BChw = block(x_BChw)
        out: Tensor = self.up(x_BChw)
        return out


class Decoder(DecoderHalf):
    """Vectors [B,D,h,w] -> parameters of the pixels' distribution, float32 [B,6,H,W] (μ, ln b) or [B,3,H,W].

    `resolutions` go from coarse to fine. Where finer ones have codes too, their vectors are added to what the coarser
    ones give, by the model (vqvae.py).
    """

    def __init__(self, config: ArchitectureConfig, code_width: int) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        widths = config.widths[::-1]
        finer = (*widths[1:], None)
        self.stem = conv(code_width, widths[0], 1)
        self.resolutions = nn.ModuleList(DecoderResolution(w, finer[i], config) for i, w in enumerate(widths))
        self.head = conv(widths[-1], output_channels(config.reconstruction) * config.patch_size**2, 1)

    def forward(self, z_BDhw: Tensor) -> Tensor:
        return self.finish(self.stem(z_BDhw), 0)

    def finish(self, x_BChw: Tensor, begin: int) -> Tensor:
        """From the input of resolution `begin` (the number of resolutions: none is left) to the pixels."""
        for resolution in self.resolutions[begin:]:
            x_BChw = resolution(x_BChw)
        # Pixel values in float32: at the end of training the loss resolves finer steps than bfloat16 has.
        return F.pixel_shuffle(self.head(F.relu(x_BChw)).float(), self.patch_size)


def conv(in_width: int, out_width: int, kernel: int) -> nn.Conv2d:
    """A convolution that keeps the size, with weights that keep the variance."""
    layer = nn.Conv2d(in_width, out_width, kernel, padding=kernel // 2)
    nn.init.normal_(layer.weight, std=(in_width * kernel**2) ** -0.5)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def use_channels_last(module: nn.Module) -> None:
    """Kernels [out,in,h,w] in channels-last memory: on a CPU convolutions are 1.3 to 1.7 times as fast."""
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack this overload
