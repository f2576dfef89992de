"""CLIP (Radford et al. 2021) and DINOv2 (Oquab et al. 2024) through transformers, as extractors; and CLIP as a judge.

Both come from a folder that `save_pretrained` wrote, or by a name in transformers' cache; nothing is downloaded here.
Images are squeezed to the network's square by our own resizing (`features.resized`), not by the model's processor,
which needs torchvision and crops; mean and deviation are the processor's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.core.atomic_io import sha256_file
from pipeline.core.errors import UserError
from pipeline.extractors.base import Extractor, ExtractorInfo, resize_rule

_LABELS = {"clip": "CLIP", "dinov2": "DINOv2"}
_CLASSES = {"clip": "CLIPModel", "dinov2": "Dinov2Model"}


class _ImageTower(nn.Module):
    """CLIP: the projected embedding. DINOv2: the class token after the last normalisation."""

    def __init__(self, model: Any, name: str) -> None:
        super().__init__()
        self.model = model.vision_model if name == "clip" else model
        self.projection = model.visual_projection if name == "clip" else nn.Identity()

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.projection(self.model(pixel_values=x).pooler_output), None


def load_pretrained(name: str, device: torch.device, batch_size: int, weights: str | None) -> Extractor:
    """Extractor `clip` or `dinov2`.

    Raises:
        UserError: `weights` is missing, or is not such a model.
    """
    folder, model = _load(name, weights, f"evaluate.extractor {name}", "evaluate.weights")
    return _extractor(name, folder, model, device, batch_size)


class ClipScorer:
    """How well images fit their captions, in CLIP's eyes.

    score = 100 · max(cos(image, caption), 0)        (Hessel et al. 2021, eq. 1, with w = 100 as torchmetrics has it)
    R@k   = share of images whose own caption is among the k nearest of all n captions
    """

    def __init__(self, weights: str, device: torch.device, batch_size: int = 64) -> None:
        from transformers import AutoTokenizer

        folder, model = _load("clip", weights, "evaluate.clip", "evaluate.clip")
        self.images = _extractor("clip", folder, model, device, batch_size)
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise UserError(
                f"evaluate.clip {folder}: expected the model's tokenizer beside it, found none; save it there"
            ) from error
        self._text_model, self._text_projection = model.text_model, model.text_projection
        self._length = model.config.text_config.max_position_embeddings
        self._device, self._batch_size = device, batch_size

    @torch.inference_mode()
    def captions(self, captions: Sequence[str]) -> Tensor:
        """Embeddings float32 `[n, dimensions]`; captions longer than the model's window are cut."""
        found = []
        for start in range(0, len(captions), self._batch_size):
            tokens = self._tokenizer(
                list(captions[start : start + self._batch_size]),
                padding=True,
                truncation=True,
                max_length=self._length,
                return_tensors="pt",
            ).to(self._device)
            output = self._text_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
            found.append(self._text_projection(output.pooler_output).float().cpu())
        return torch.cat(found)


def _load(name: str, weights: str | None, what: str, key: str) -> tuple[Path, Any]:
    import transformers
    from transformers.utils import cached_file

    if not weights:
        raise UserError(
            f"{what}: expected {key}, a folder that transformers' save_pretrained wrote, or a name in its cache"
        )
    try:
        config = cached_file(weights, "config.json", local_files_only=True)
    except OSError as error:
        raise UserError(
            f"{what}: no model at {weights}; expected a folder with config.json, preprocessor_config.json and "
            f"model.safetensors, or the name of a model in transformers' cache (nothing is downloaded): set {key}"
        ) from error
    folder = Path(str(config)).parent
    found = json.loads((folder / "config.json").read_text()).get("model_type")
    if found != name:
        raise UserError(f"{what}: expected a model of type {name} in {folder}, found {found}")
    try:
        model = getattr(transformers, _CLASSES[name]).from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{what}: the model in {folder} cannot be read ({str(error).splitlines()[0]})") from error
    return folder, model.eval().requires_grad_(False)


def _extractor(name: str, folder: Path, model: Any, device: torch.device, batch_size: int) -> Extractor:
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        raise UserError(f"{folder}: expected preprocessor_config.json (mean and deviation of pixels), found none")
    processor = json.loads(path.read_text())
    vision = model.config.vision_config if name == "clip" else model.config
    side = _side(name, processor, vision.image_size)
    info = ExtractorInfo(name, _LABELS[name], _hash(folder), resize_rule(side))
    mean, deviation = (tuple(255.0 * v for v in processor[key]) for key in ("image_mean", "image_std"))
    return Extractor(info, _ImageTower(model, name).eval().to(device), side, mean, deviation, batch_size)


def _side(name: str, processor: dict[str, Any], trained: int) -> int:
    """Pixels. DINOv2 is published for 224 although its positions were trained for 518: the processor's crop decides."""
    crop = processor.get("crop_size")
    if name == "dinov2" and isinstance(crop, dict):
        return int(crop["height"])
    return trained


def _hash(folder: Path) -> str:
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    hashes = [sha256_file(file) for file in files]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
