"""The one encoder and decoder that all kinds of tokenizer share: images to features, vectors of codes to images.

    image → fold patches into channels → blocks, halve, blocks, halve, … → features at each resolution
    vectors → 1×1 → blocks, double, blocks, … → 1×1 → unfold patches

As in Ramesh et al. 2021 (appendix A): residual blocks whose branch is scaled down, max-pooling down, nearest neighbour
up, 1×1 convolutions at the bottleneck. `patch_size` is ours: folding pixels into channels first leaves no layer at the
full resolution, where a small machine would spend most of its time.

`residual_stack` makes the blocks of one resolution, or their continuous counterpart (`ode.py`).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config.image_tokenizer import ArchitectureConfig
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


def residual_stack(width: int, config: ArchitectureConfig) -> list[nn.Module]:
    """The blocks of one resolution, [B,width,h,w] -> [B,width,h,w], one after the other."""
    gain = 1 / (len(config.widths) * config.blocks) ** 2
    blocks = [ResidualBlock(width, config, gain) for _ in range(config.blocks)]
    if config.block == "ode":
        from pipeline.image_tokenizer.ode import OdeStack  # its library loads scipy: half a second

        return [OdeStack([block.branch for block in blocks], gain, config.ode)]
    return list(blocks)


class Encoder(nn.Module):
    """Images [B,3,H,W] in [0,1] -> features [B,C,h,w] of the coarsest resolution, or of each."""

    def __init__(self, config: ArchitectureConfig) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.PixelUnshuffle(config.patch_size)]
        layers.append(conv(3 * config.patch_size**2, config.widths[0], config.stem_kernel))
        self._ends: list[int] = []  # index of the layer behind each resolution, fine to coarse
        for i, width in enumerate(config.widths):
            if i:
                layers += [nn.MaxPool2d(2), conv(config.widths[i - 1], width, 1)]
            layers += residual_stack(width, config)
            self._ends.append(len(layers))
        self.layers = nn.Sequential(*layers, nn.ReLU())

    def forward(self, images_B3HW: Tensor) -> Tensor:
        return self.pyramid(images_B3HW)[-1]

    def pyramid(self, images_B3HW: Tensor) -> list[Tensor]:
        """Features of every resolution, fine to coarse, each after a ReLU."""
        x, features, begin = 2 * images_B3HW - 1, [], 0
        for end in self._ends:
            x, begin = self.layers[begin:end](x), end
            features.append(x)
        return [F.relu(feature) for feature in features[:-1]] + [self.layers[-1](x)]


class Decoder(nn.Module):
    """Vectors [B,D,h,w] -> parameters of the pixels' distribution, float32 [B,6,H,W] (μ, ln b) or [B,3,H,W].

    Where finer resolutions have codes too, their vectors come in between `enter` and `blocks`.
    """

    def __init__(self, config: ArchitectureConfig, code_width: int) -> None:
        super().__init__()
        widths = config.widths[::-1]
        layers: list[nn.Module] = [conv(code_width, widths[0], 1)]
        self._parts: list[tuple[int, int, int]] = []  # a resolution's entrance, blocks and end, coarse to fine
        for i, width in enumerate(widths):
            begin = len(layers) if i else 0
            if i:
                layers += [nn.Upsample(scale_factor=2, mode="nearest"), conv(widths[i - 1], width, 1)]
            entered = len(layers)
            layers += residual_stack(width, config)
            self._parts.append((begin, entered, len(layers)))
        channels = output_channels(config.reconstruction)
        self.layers = nn.Sequential(*layers, nn.ReLU(), conv(widths[-1], channels * config.patch_size**2, 1))
        self.patch_size = config.patch_size

    def forward(self, z_BDhw: Tensor) -> Tensor:
        return self.finish(self.enter(z_BDhw, 0), 0)

    def enter(self, x_BChw: Tensor, resolution: int) -> Tensor:
        """Into a resolution (0: the coarsest), from vectors or from what `blocks` of the coarser one gave."""
        begin, entered, _ = self._parts[resolution]
        out: Tensor = self.layers[begin:entered](x_BChw)
        return out

    def blocks(self, x_BChw: Tensor, resolution: int) -> Tensor:
        _, entered, end = self._parts[resolution]
        out: Tensor = self.layers[entered:end](x_BChw)
        return out

    def finish(self, x_BChw: Tensor, resolution: int) -> Tensor:
        """From the blocks of a resolution to the pixels."""
        _, entered, _ = self._parts[resolution]
        # Pixel values in float32: at the end of training the loss resolves finer steps than bfloat16 has.
        return F.pixel_shuffle(self.layers[entered:](x_BChw).float(), self.patch_size)


def conv(in_width: int, out_width: int, kernel: int) -> nn.Conv2d:
    """A convolution that keeps the size, with weights that keep the variance."""
    layer = nn.Conv2d(in_width, out_width, kernel, padding=kernel // 2)
    nn.init.normal_(layer.weight, std=(in_width * kernel**2) ** -0.5)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer
