"""The network behind LPIPS 0.1: VGG-16 (Simonyan & Zisserman 2015, table 1, D) and the learned weights of its channels.

    lpips = Lpips.from_folder(Path("weights"))      # or Lpips.from_libraries
    lpips(images, others)                           # [n, 3, H, W] in [0, 1] -> float64 [n]

It is no extractor of the registry, since it looks at pairs. `metrics/lpips.py` has the formula. The weights are in no
package that Smalti installs: `Lpips.from_folder` says where they go.
"""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.core.atomic_io import sha256_file
from pipeline.core.errors import UserError
from pipeline.core.image_size import images_at_once
from pipeline.metrics.lpips import lpips_distance, unit_length

BACKBONE, HEADS = "vgg16-397923af.pth", "vgg.pth"
_LAYERS = (
    (0, 2),
    (5, 7),
    (10, 12, 14),
    (17, 19, 21),
    (24, 26, 28),
)  # convolutions by index in the published state dict
_WIDTHS = (64, 128, 256, 512, 512)
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of images in [-1, 1]


class Lpips(nn.Module):
    """LPIPS of pairs of images; frozen when loaded by `from_folder` or `from_libraries`."""

    name = "vgg-16 with the heads of LPIPS 0.1"
    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.ModuleDict()
        width = 3
        for indices, out in zip(_LAYERS, _WIDTHS, strict=True):
            for index in indices:
                self.features[str(index)] = nn.Conv2d(width, out, 3, padding=1)
                width = out
        self.heads = nn.ParameterList([nn.Parameter(torch.zeros(1, width, 1, 1)) for width in _WIDTHS])
        # Buffers: a constant made in a training step would be copied to the device in it.
        self.register_buffer("shift", torch.tensor(_SHIFT).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(_SCALE).view(3, 1, 1), persistent=False)
        self.weights_sha256 = ""

    @classmethod
    def from_folder(cls, folder: Path, key: str = "evaluate.lpips") -> Lpips:
        """The network from a folder with torchvision's VGG-16 and the heads of LPIPS 0.1. `key` is named in errors.

        Raises:
            UserError: a file is missing or is something else.
        """
        return cls._from_files(folder / BACKBONE, folder / HEADS, key)

    @classmethod
    def from_libraries(cls, key: str) -> Lpips:
        """The network from torch.hub's cache, where torchvision puts VGG-16, and the installed package lpips.

        Raises:
            UserError: as `from_folder`.
        """
        package = find_spec("lpips")  # only looked for: importing it needs torchvision
        root = Path(package.origin).parent if package and package.origin else Path("lpips")
        hub = Path(torch.hub.get_dir()) / "checkpoints"
        return cls._from_files(hub / BACKBONE, root / "weights" / "v0.1" / HEADS, key)

    @classmethod
    def _from_files(cls, backbone_file: Path, heads_file: Path, key: str) -> Lpips:
        for file, origin in (
            (backbone_file, "torchvision's ImageNet VGG-16, download.pytorch.org/models"),
            (heads_file, "weights/v0.1/vgg.pth of the lpips package"),
        ):
            if not file.is_file():
                raise UserError(
                    f"{key}: expected {file.name} ({origin}) in the folder {file.parent}, found none; put it there"
                )
        model = cls()
        try:
            backbone = torch.load(backbone_file, map_location="cpu", weights_only=True)
            heads = torch.load(heads_file, map_location="cpu", weights_only=True)
            model.features.load_state_dict(
                {name.removeprefix("features."): v for name, v in backbone.items() if name.startswith("features.")}
            )
            for i, head in enumerate(model.heads):
                head.data.copy_(heads[f"lin{i}.model.1.weight"])
        except Exception as error:  # torch and pickle raise whatever they meet
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise UserError(f"{key}: the files in {backbone_file.parent} are not those of VGG-16 ({reason})") from error
        hashes = sha256_file(backbone_file) + sha256_file(heads_file)
        model.weights_sha256 = hashlib.sha256(hashes.encode()).hexdigest()
        return model.requires_grad_(False).eval()

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """LPIPS of each pair of images `[n, 3, H, W]` in [0, 1], at least 16 × 16: float64 `[n]`."""
        if images.shape != others.shape:
            raise UserError(f"LPIPS: expected equal shapes, found {tuple(images.shape)} and {tuple(others.shape)}")
        if min(images.shape[-2:]) < 16:
            raise UserError(f"LPIPS: expected images of at least 16 × 16 pixels, found {tuple(images.shape[-2:])}")
        return lpips_distance(self._activations(images), self._activations(others), self.heads)

    @torch.inference_mode()
    def batched(self, images: Tensor, others: Tensor, batch_size: int = 16) -> Tensor:
        """As `forward`, for any number of pairs on any device, large ones fewer at a time: float64 `[n]` on the CPU."""
        device, batch_size = self.heads[0].device, min(batch_size, images_at_once(*images.shape[-2:]))
        pairs = zip(images.split(batch_size), others.split(batch_size), strict=True)
        return torch.cat([self(x.float().to(device), y.float().to(device)).cpu() for x, y in pairs])

    def _activations(self, images: Tensor) -> list[Tensor]:
        """What the last convolution of each group gives, each position scaled to unit length."""
        x = 2 * images - 1
        x = (x - self.shift) / self.scale
        found = []
        for i, indices in enumerate(_LAYERS):
            if i:
                x = F.max_pool2d(x, 2)
            for index in indices:
                x = F.relu(self.features[str(index)](x))
            found.append(unit_length(x))
        return found
