"""Inception-v3 as the network of published FID: TensorFlow's `inception-2015-12-05`, in PyTorch.

Szegedy et al. 2016, table 1 and figures 4-7, as the converted weights have it: 1,008 classes, average pools that do not
count the padding, and a maximum pool where the last block should average. Parameter names are those of the state
dict that pytorch-fid and torch-fidelity publish (the same file under two names), so that it loads strictly.
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

FEATURES, CLASSES = 2048, 1008
_SPATIAL, _SPATIAL_CHANNELS = "Mixed_6d", 7
# One state dict under two names: those of pytorch-fid and of torch-fidelity.
_FILES = ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth")
_SOURCE = "the release fid_weights of mseitzer/pytorch-fid, or v0.2.0 of toshas/torch-fidelity, on GitHub"

Kernel = int | tuple[int, int]
Conv = tuple[str, int, Kernel, int]  # name, channels out, kernel, stride
Step = Conv | str | list[Conv]  # a convolution, a pool, or a fork whose ends are concatenated


class _Conv(nn.Module):
    def __init__(self, channels_in: int, channels_out: int, kernel: Kernel, stride: int = 1, pad: bool = True) -> None:
        super().__init__()
        size = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (size[0] // 2, size[1] // 2) if pad else (0, 0)
        self.conv = nn.Conv2d(channels_in, channels_out, size, stride, padding, bias=False)
        self.bn: nn.BatchNorm2d | None = nn.BatchNorm2d(channels_out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return F.relu(x if self.bn is None else self.bn(x))

    def fold_norm(self) -> None:
        """Fold the normalisation into the convolution. In place."""
        if self.bn is not None:
            self.conv, self.bn = fuse_conv_bn_eval(self.conv, self.bn), None


class _Mixed(nn.Module):
    """Branches side by side, concatenated. Convolutions of stride 2 do not pad."""

    def __init__(self, channels: int, branches: list[list[Step]]) -> None:
        super().__init__()
        self.branches = branches
        self.channels = 0
        for branch in branches:
            width = channels
            for step in branch:
                forks = [step] if isinstance(step, tuple) else step if isinstance(step, list) else []
                for name, out, kernel, stride in forks:
                    self.add_module(name, _Conv(width, out, kernel, stride, pad=stride == 1))
                width = sum(out for _, out, _, _ in forks) or width
            self.channels += width

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self._run(branch, x) for branch in self.branches], dim=1)

    def _run(self, branch: list[Step], x: Tensor) -> Tensor:
        for step in branch:
            if step == "average":
                x = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
            elif step == "maximum":
                x = F.max_pool2d(x, 3, stride=1, padding=1)
            elif step == "halve":
                x = F.max_pool2d(x, 3, stride=2)
            elif isinstance(step, list):
                x = torch.cat([getattr(self, name)(x) for name, *_ in step], dim=1)
            else:
                x = getattr(self, step[0])(x)
        return x


# The blocks of figures 4 to 7, named as in the state dict.
def _a(pool: int) -> list[list[Step]]:
    return [
        [("branch1x1", 64, 1, 1)],
        [("branch5x5_1", 48, 1, 1), ("branch5x5_2", 64, 5, 1)],
        [("branch3x3dbl_1", 64, 1, 1), ("branch3x3dbl_2", 96, 3, 1), ("branch3x3dbl_3", 96, 3, 1)],
        ["average", ("branch_pool", pool, 1, 1)],
    ]


def _b() -> list[list[Step]]:
    return [
        [("branch3x3", 384, 3, 2)],
        [("branch3x3dbl_1", 64, 1, 1), ("branch3x3dbl_2", 96, 3, 1), ("branch3x3dbl_3", 96, 3, 2)],
        ["halve"],
    ]


def _c(width: int) -> list[list[Step]]:
    across, down = (1, 7), (7, 1)
    return [
        [("branch1x1", 192, 1, 1)],
        [("branch7x7_1", width, 1, 1), ("branch7x7_2", width, across, 1), ("branch7x7_3", 192, down, 1)],
        [
            ("branch7x7dbl_1", width, 1, 1),
            ("branch7x7dbl_2", width, down, 1),
            ("branch7x7dbl_3", width, across, 1),
            ("branch7x7dbl_4", width, down, 1),
            ("branch7x7dbl_5", 192, across, 1),
        ],
        ["average", ("branch_pool", 192, 1, 1)],
    ]


def _d() -> list[list[Step]]:
    return [
        [("branch3x3_1", 192, 1, 1), ("branch3x3_2", 320, 3, 2)],
        [
            ("branch7x7x3_1", 192, 1, 1),
            ("branch7x7x3_2", 192, (1, 7), 1),
            ("branch7x7x3_3", 192, (7, 1), 1),
            ("branch7x7x3_4", 192, 3, 2),
        ],
        ["halve"],
    ]


def _e(pool: str) -> list[list[Step]]:
    def fork(name: str) -> list[Conv]:
        return [(f"{name}a", 384, (1, 3), 1), (f"{name}b", 384, (3, 1), 1)]

    return [
        [("branch1x1", 320, 1, 1)],
        [("branch3x3_1", 384, 1, 1), fork("branch3x3_2")],
        [("branch3x3dbl_1", 448, 1, 1), ("branch3x3dbl_2", 384, 3, 1), fork("branch3x3dbl_3")],
        [pool, ("branch_pool", 192, 1, 1)],
    ]


_MIXED: tuple[tuple[str, list[list[Step]]], ...] = (
    ("Mixed_5b", _a(32)),
    ("Mixed_5c", _a(64)),
    ("Mixed_5d", _a(64)),
    ("Mixed_6a", _b()),
    ("Mixed_6b", _c(128)),
    ("Mixed_6c", _c(160)),
    ("Mixed_6d", _c(160)),
    ("Mixed_6e", _c(192)),
    ("Mixed_7a", _d()),
    ("Mixed_7b", _e("average")),
    ("Mixed_7c", _e("maximum")),
)


class InceptionV3(nn.Module):
    """Images `[B, 3, 299, 299]`, (value − 128) / 128 of 0…255, to features `[B, 2048]`, logits `[B, 1008]` and spatial
    features `[B, 17 * 17 * 7]`, those of sFID (Nash et al. 2021) in the order of guided-diffusion's evaluator.

    The spatial ones are the first 7 channels of TensorFlow's `mixed_6/conv` after its ReLU: Mixed_6d's 1 × 1 branch.
    The logits are without the last layer's bias, as Inception Score has them since Salimans et al.'s own code.
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Conv(3, 32, 3, stride=2, pad=False)
        self.Conv2d_2a_3x3 = _Conv(32, 32, 3, pad=False)
        self.Conv2d_2b_3x3 = _Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = _Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = _Conv(80, 192, 3, pad=False)
        channels = 192
        for name, branches in _MIXED:
            mixed = _Mixed(channels, branches)
            self.add_module(name, mixed)
            channels = mixed.channels
        self.fc = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, stride=2)
        for name, _ in _MIXED:
            if name == _SPATIAL:
                spatial = self.get_submodule(f"{name}.branch1x1")(x)[:, :_SPATIAL_CHANNELS]
            x = getattr(self, name)(x)
        features = x.mean(dim=(2, 3))
        return features, features @ self.fc.weight.T, spatial.permute(0, 2, 3, 1).flatten(1)

    def fold_norms(self) -> InceptionV3:
        """Fold each normalisation into the convolution before it. In place."""
        self.eval()
        for module in self.modules():
            if isinstance(module, _Conv):
                module.fold_norm()
        return self


def load(device: torch.device, batch_size: int, weights: str | None) -> Extractor:
    """The extractor `inception-v3`, from a file, or from torch.hub's cache.

    Raises:
        UserError: no such file, or it holds something else.
    """
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    candidates = [Path(weights)] if weights else [cache / name for name in _FILES]
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        raise UserError(
            f"evaluate.extractor inception-v3: no weights at {candidates[0]}; get {_FILES[0]} "
            f"({_SOURCE}), then put it there or set evaluate.weights to where it is"
        )
    network = InceptionV3()
    try:
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # torch and pickle raise whatever they meet
        raise UserError(
            f"evaluate.weights {path}: expected the state dict {_FILES[0]}, found something else"
            f" ({str(error).splitlines()[0]})"
        ) from error
    network.fold_norms().requires_grad_(False).to(device)
    info = ExtractorInfo("inception-v3", "Inception-v3", sha256_file(path), resize_rule(299))
    return Extractor(info, network, 299, (128.0,), (128.0,), batch_size, has_spatial=True)
