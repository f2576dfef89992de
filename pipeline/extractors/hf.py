"""Pretrained models of transformers as extractors: what `clip.py` and `dinov2.py` share.

A model comes from a folder that `save_pretrained` wrote, or by a name in transformers' cache; nothing is downloaded.
Images are squeezed to the network's square by our own resizing (`base.resized`), not by the model's processor, which
needs torchvision and crops; mean and deviation are the processor's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from pipeline.core.atomic_io import read_json, sha256_file
from pipeline.core.errors import UserError
from pipeline.extractors.base import Extractor, ExtractorInfo, resize_rule

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Model = TypeVar("Model", bound="PreTrainedModel")


def read_model(model_class: type[Model], kind: str, weights: str | None, what: str, key: str) -> tuple[Path, Model]:
    """The model's folder, and the model: frozen, on the CPU.

    Args:
        kind: the `model_type` that the folder's config.json must have.
        what: names the user of the model in errors.
        key: the config's key of `weights`.

    Raises:
        UserError: `weights` is missing, or is not such a model.
    """
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
    about = read_json(folder / "config.json")
    found = about.get("model_type") if isinstance(about, dict) else None
    if found != kind:
        raise UserError(f"{what}: expected a model of type {kind} in {folder}, found {found}")
    try:
        model = model_class.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers, safetensors and pickle raise whatever they meet
        why = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{what}: the model in {folder} cannot be read ({why})") from error
    return folder, model.eval().requires_grad_(False)


def image_extractor(
    name: str, label: str, folder: Path, network: nn.Module, side: int, device: torch.device, batch_size: int
) -> Extractor:
    """`network` as an extractor of images resized to `side` pixels, with the mean and deviation that `folder` names.

    Raises:
        UserError: `folder` has no preprocessor_config.json.
    """
    processor = read_processor(folder)
    try:
        mean, deviation = (tuple(255.0 * v for v in processor[key]) for key in ("image_mean", "image_std"))
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{folder}/preprocessor_config.json: expected image_mean and image_std, a number for each channel, found"
            f" something else ({error!r})"
        ) from error
    info = ExtractorInfo(name, label, _hash(folder), resize_rule(side))
    return Extractor(info, network.eval().to(device), side, mean, deviation, batch_size)


def read_processor(folder: Path) -> dict[str, Any]:
    """preprocessor_config.json. Raises UserError if there is none."""
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        raise UserError(f"{folder}: expected preprocessor_config.json (mean and deviation of pixels), found none")
    processor: dict[str, Any] = read_json(path)
    return processor


def square_side(image_size: int | Sequence[int]) -> int:
    """`image_size` of a model's config, in pixels: a number, or height and width."""
    return image_size if isinstance(image_size, int) else image_size[0]


def _hash(folder: Path) -> str:
    """SHA-256 of the weights; of several files that of their hashes."""
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    hashes = [sha256_file(file) for file in files]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
