"""A perceptual distance as a loss: images compared in the features of a frozen network (Johnson et al. 2016).

    d(x, x̂) = 1/L · Σ_l  mean over positions of ‖f_l(x) − f_l(x̂)‖²

with f_l the activations of layer l scaled to unit length in each position, as in LPIPS (Zhang et al. 2018, section 3),
without its learned weights of channels. `backbone: lpips` is LPIPS itself.

    efficientnet-lite0   what its blocks give before each halving; the weights come with a package (`smalti[demo]`)
    lpips                VGG-16 and learned heads: a folder with both (extractors/lpips_vgg16.py says which files), or,
                         without `weights`, torch.hub's cache and the installed package lpips
    transformers         any model that transformers has as a backbone: ResNet, ConvNeXt, DINOv2 …
    timm                 any model of timm with `features_only`

Nothing is downloaded, but by timm, which fetches a name that its cache does not hold. The network is no part of the
objective's state: checkpoints, optimizer and moving average know nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config.image_losses import PerceptualConfig
from pipeline.core.errors import UserError
from pipeline.core.image_size import ImageSize, height_width
from pipeline.image_tokenizer.architecture import use_channels_last

_KEY = "image_tokenizer.perceptual"
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of images in [0, 1]

Colors = tuple[float, ...]  # a value for each channel, or one for all
Distance = Callable[[Tensor, Tensor], Tensor]  # two [B,3,h,w] -> a scalar


class Perceptual(nn.Module):
    """Images [B,3,H,W] in [0,1] and reconstructions, not clamped -> their mean distance, a scalar ≥ 0.

    In float32 under autocast, too: in bfloat16 the gradients of near images would point elsewhere.
    """

    def __init__(self, config: PerceptualConfig, image_size: ImageSize) -> None:
        """Raises UserError when the network or its weights are not there, or images are too small for it."""
        super().__init__()
        self.config = config
        network, distance = _LOADERS[config.backbone](config)
        use_channels_last(network)
        # In a tuple, so that nn.Module does not take it for its own.
        self._frozen = (network.eval().requires_grad_(False),)
        self._distance = distance
        height, width = self._seen(*height_width(image_size))
        try:
            with torch.no_grad():
                distance(*torch.zeros(2, 1, 3, height, width))
        except (UserError, RuntimeError, ValueError) as error:
            raise UserError(
                f"{_KEY}: {config.backbone} cannot take images of {height}×{width} ({_first_line(error)}):"
                f" set {_KEY}.resize to what it was trained on"
            ) from error

    def forward(self, images: Tensor, rebuilt: Tensor, step: int) -> Tensor:
        if step < self.config.start_step:
            return torch.zeros((), device=images.device)
        [network] = self._frozen
        if next(network.parameters()).device != images.device:
            network.to(images.device)
        with torch.autocast(images.device.type, enabled=False):
            return self._distance(self._sized(images.float()), self._sized(rebuilt.float())).float()

    def _sized(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        if (seen := self._seen(height, width)) != (height, width):
            images = F.interpolate(images, seen, mode="bicubic", antialias=True)
        return images.contiguous(memory_format=torch.channels_last)

    def _seen(self, height: int, width: int) -> tuple[int, int]:
        """Height and width that the network sees."""
        if self.config.resize is None:
            return height, width
        scale = self.config.resize / min(height, width)
        return round(height * scale), round(width * scale)


def feature_distance(features: list[Tensor], others: list[Tensor]) -> Tensor:
    """The distance of the module's docstring, from the activations [B,C,h,w] of each layer."""
    each = [(_unit(x) - _unit(y)).square().sum(dim=1).mean() for x, y in zip(features, others, strict=True)]
    return torch.stack(each).mean()


def _unit(x: Tensor) -> Tensor:
    x = x.float()
    return x / (x.square().sum(dim=1, keepdim=True) + 1e-10).sqrt()


class _Backbone(nn.Module):
    """Images [B,3,h,w], in [0,1] if real -> a network's activations [B,C,h,w] of each layer."""

    shift: Tensor
    scale: Tensor

    def __init__(
        self, network: nn.Module, layers: Callable[[Tensor], list[Tensor]], peak: float, shift: Colors, scale: Colors
    ) -> None:
        """`layers`: the network from its input on; that is images times `peak`, less `shift`, through `scale`."""
        super().__init__()
        self.network = network
        self.peak = peak
        self._layers = layers
        # Buffers: a constant made in a step would be copied to the device in it.
        self.register_buffer("shift", torch.tensor(shift).view(-1, 1, 1))
        self.register_buffer("scale", torch.tensor(scale).view(-1, 1, 1))

    def forward(self, images: Tensor) -> list[Tensor]:
        return self._layers((self.peak * images - self.shift) / self.scale)

    def distance(self, images: Tensor, rebuilt: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self(images)
        return feature_distance(wanted, self(rebuilt))


def _efficientnet_lite0(config: PerceptualConfig) -> tuple[nn.Module, Distance]:
    from pipeline.extractors.efficientnet_lite0 import EfficientNetLite0
    from pipeline.extractors.registry import load_extractor

    try:
        extractor = load_extractor("efficientnet-lite0", torch.device("cpu"))
    except UserError as error:
        raise UserError(f"{_KEY}.backbone efficientnet-lite0: {str(error).partition(': ')[2]}") from error
    network = extractor.network
    assert isinstance(network, EfficientNetLite0)
    backbone = _Backbone(network, network.resolutions, 255, extractor.shift, extractor.scale)
    return backbone, backbone.distance


def _lpips(config: PerceptualConfig) -> tuple[nn.Module, Distance]:
    from pipeline.extractors.lpips_vgg16 import Lpips

    key = f"{_KEY}.weights"
    lpips = Lpips.from_folder(Path(config.weights), key) if config.weights else Lpips.from_libraries(key)
    return lpips, lambda x, y: lpips(x, y).mean()


def _transformers(config: PerceptualConfig) -> tuple[nn.Module, Distance]:
    from transformers import MODEL_FOR_BACKBONE_MAPPING, AutoConfig
    from transformers.utils import cached_file

    try:
        # `AutoBackbone` takes no folder (transformers 5.23), so its table is read here.
        folder = Path(str(cached_file(str(config.weights), "config.json", local_files_only=True))).parent
        about = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        layers = len(about.stage_names)
        # Not the stem, which sees little more than the pixels' loss does; of a deep one every third, to the last.
        chosen = list(range(1, layers)) if layers <= 6 else list(range(layers - 1, 0, -3))[::-1]
        backbone: Any = MODEL_FOR_BACKBONE_MAPPING[type(about)]
        network = backbone.from_pretrained(folder, local_files_only=True, out_indices=chosen)
    except Exception as error:  # transformers, safetensors and pickle raise whatever they meet
        raise UserError(
            f"{_KEY}.weights: expected a backbone that transformers has here, a folder or a name in its cache (nothing"
            f" is downloaded), found {config.weights} ({_first_line(error)})"
        ) from error
    return _standardized(network, lambda x: list(network(pixel_values=x).feature_maps))


def _timm(config: PerceptualConfig) -> tuple[nn.Module, Distance]:
    name, _, file = str(config.weights).partition("=")
    try:
        import timm
    except ImportError as error:
        raise UserError(f"{_KEY}.backbone timm: timm is not installed; run `pip install timm`") from error
    try:
        overlay = {"file": file} if file else None
        network = timm.create_model(name, features_only=True, pretrained=True, pretrained_cfg_overlay=overlay)
    except Exception as error:  # timm, its hub and torch raise whatever they meet
        raise UserError(
            f"{_KEY}.weights: timm cannot load {config.weights} ({_first_line(error)}): expected NAME=FILE, or"
            " the name of a model in its cache"
        ) from error
    return _standardized(network, lambda x: list(network(x)))


def _standardized(network: nn.Module, layers: Callable[[Tensor], list[Tensor]]) -> tuple[nn.Module, Distance]:
    backbone = _Backbone(network, layers, 1, _MEAN, _DEVIATION)
    return backbone, backbone.distance


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


_LOADERS: dict[str, Callable[[PerceptualConfig], tuple[nn.Module, Distance]]] = {
    "efficientnet-lite0": _efficientnet_lite0,
    "lpips": _lpips,
    "transformers": _transformers,
    "timm": _timm,
}
