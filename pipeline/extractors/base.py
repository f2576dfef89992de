"""What a feature extractor is: a frozen pretrained network with the resizing and scaling of images that it expects.

    extractor = load_extractor("efficientnet-lite0", device)      # registry.py
    real = extractor(images)            # any iterable of PIL images, of any sizes
    real.features, real.logits          # float32 [n, 1280], [n, 1000]
    real.info                           # name, hash of the weights, rule of resizing

Metrics of different extractors cannot be compared, so each is named after its extractor ("FD (Lite0)"; "FID" is
kept for Inception's) and carries the hash of the weights and the rule by which images were resized.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from pipeline.core import signals
from pipeline.core.errors import UserError
from pipeline.core.progress import progress

_PIXELS_AT_ONCE = 2**22  # 64 images of 256 × 256; larger ones one at a time
_CUDA_SCALES = 80  # of height and width together: from some 94 on torch's kernel is refused for its shared memory


@dataclass(frozen=True)
class ExtractorInfo:
    """The identity of an extractor: what decides its features. Two sets may be compared if theirs are equal."""

    name: str
    label: str  # short, for the names of metrics: "FD (Lite0)"
    weights_sha256: str
    resize: str


@dataclass(frozen=True)
class FeatureSet:
    """Features and logits of n images, with the identity of the extractor that made them."""

    features: Tensor  # float [n, dimensions]
    logits: Tensor | None  # float [n, classes]; None: the network is no classifier
    info: ExtractorInfo
    spatial: Tensor | None = None  # float [n, positions * channels], of Inception alone

    def __len__(self) -> int:
        return len(self.features)

    def take(self, indices: list[int] | slice) -> FeatureSet:
        """The images of these indices."""
        logits, spatial = (None if values is None else values[indices] for values in (self.logits, self.spatial))
        return FeatureSet(self.features[indices], logits, self.info, spatial)

    def joined(self, other: FeatureSet) -> FeatureSet:
        """These images, then those of `other`, a set of the same extractor."""
        logits, spatial = (
            None if a is None or b is None else torch.cat([a, b])
            for a, b in ((self.logits, other.logits), (self.spatial, other.spatial))
        )
        return FeatureSet(torch.cat([self.features, other.features]), logits, self.info, spatial)


@dataclass(frozen=True)
class Extractor:
    """A pretrained network with the input that it was trained on."""

    info: ExtractorInfo
    network: nn.Module = field(repr=False)  # [B, 3, side, side], shifted, scaled -> features, logits or None[, spatial]
    side: int  # pixels
    shift: tuple[float, ...]  # per channel, of values in 0…255; one value is for all channels
    scale: tuple[float, ...]
    batch_size: int = 64
    has_spatial: bool = False  # the network gives spatial features, too

    @torch.inference_mode()
    def __call__(self, images: Iterable[Image.Image], total: int | None = None, description: str = "") -> FeatureSet:
        """Features and logits of RGB images, in their order. Few of them are held at their own size at once.

        Raises:
            UserError: no images.
        """
        features: list[Tensor] = []
        logits: list[Tensor] = []
        spatial: list[Tensor] = []
        with progress(total=total, description=description, unit="image") as bar:
            waiting = iter(images)
            while len(batch := self.input(islice(waiting, self.batch_size))):
                signals.check()
                found, classes, *others = self.network(batch)
                features.append(found.float().cpu())
                if classes is not None:
                    logits.append(classes.float().cpu())
                if self.has_spatial:
                    spatial.append(others[0].float().cpu())
                bar.update(len(batch))
        if not features:
            raise UserError(f"{description or 'features'}: expected images, found none")
        joined = (torch.cat(values) if values else None for values in (logits, spatial))
        return FeatureSet(torch.cat(features), next(joined), self.info, next(joined))

    def input(self, images: Iterable[Image.Image]) -> Tensor:
        """The network's input of these images: float32 `[B, 3, side, side]` on its device."""
        device = next(self.network.parameters()).device
        x = resized(images, self.side, device)
        shift, scale = (torch.tensor(values, device=device).view(-1, 1, 1) for values in (self.shift, self.scale))
        # Channels last: a depthwise network runs a third faster on CPUs in this layout.
        return x.sub_(shift).div_(scale).contiguous(memory_format=torch.channels_last)


def resized(images: Iterable[Image.Image], side: int, device: torch.device | None = None) -> Tensor:
    """RGB images as float32 `[n, 3, side, side]` in 0…255, resized on `device`, taken and held a few at a time.

    Bicubic with antialiasing, in float, both sides to `side` (no crop): rounding to 8 bits after resizing, or a
    filter without antialiasing, moves FID by more than methods differ (Parmar et al. 2022, section 3).
    """
    found = [_resized(group, side, device) for group in _groups(images)]
    return torch.cat(found) if found else torch.empty(0, 3, side, side, device=device)


def _groups(images: Iterable[Image.Image]) -> Iterator[Tensor]:
    """Neighbours of one size as uint8 `[n, H, W, 3]`, at most so many that their pixels are few."""
    group: list[Tensor] = []
    for image in images:
        array = torch.from_numpy(np.array(image if image.mode == "RGB" else image.convert("RGB")))  # [H, W, 3]
        height, width, _ = array.shape
        if group and (array.shape != group[0].shape or (len(group) + 1) * height * width > _PIXELS_AT_ONCE):
            yield torch.stack(group)
            group = []
        group.append(array)
    if group:
        yield torch.stack(group)


def _resized(pixels: Tensor, side: int, device: torch.device | None) -> Tensor:
    """uint8 `[n, H, W, 3]` to float32 `[n, 3, side, side]` on `device`."""
    _, height, width, _ = pixels.shape
    where = "cpu" if height + width > _CUDA_SCALES * side else device
    x = pixels.to(where).permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    if (height, width) != (side, side):
        x = F.interpolate(x, (side, side), mode="bicubic", antialias=True).clamp_(0, 255)
    return x.to(device)


def resize_rule(side: int) -> str:
    """The rule of `resized` in words, for `ExtractorInfo.resize`."""
    return f"{side} × {side}, bicubic, antialiased, float"
