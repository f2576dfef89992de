"""What every image tokenizer is: images to grids of codes and back, saved as safetensors + config.json.

    tokenizer = ImageTokenizer.from_pretrained("runs/openmoji/image-tokenizer/model")
    codes = tokenizer.encode(images)      # [B,3,H,W] in [0,1] -> a tensor [B, h*w] per level, coarse to fine
    images = tokenizer.decode(codes)

To add one: a config class with its `kind` in pipeline/config/image_tokenizer_model.py, in the union `ModelConfig`
there; a subclass of `ImageTokenizer` in a file here; a line in `KINDS`.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config.base import parse_config
from pipeline.config.image_tokenizer_model import ModelConfig
from pipeline.core.errors import UserError
from pipeline.core.image_size import ImageSize, height_width, told
from pipeline.core.image_size import image_size as one_form
from pipeline.core.level import Level
from pipeline.core.objective import Objective, ParameterGroup
from pipeline.core.pretrained import load_model, save_model
from pipeline.image_tokenizer import legacy
from pipeline.image_tokenizer.losses import ReconstructionLoss

log = logging.getLogger(__name__)

# kind -> module:class, imported on first use
KINDS = {
    "dvae": "pipeline.image_tokenizer.dvae:DiscreteVAE",
    "vqvae": "pipeline.image_tokenizer.vqvae:VQVAE",
    "vqvae2": "pipeline.image_tokenizer.vqvae:VQVAE2",
    "color-form": "pipeline.image_tokenizer.color_form:ColorForm",
    "vqgan": "pipeline.image_tokenizer.vqgan:VQGAN",
    "vit": "pipeline.image_tokenizer.vit:ViT",
    "openai-dvae": "pipeline.image_tokenizer.openai_dvae:OpenAIDVAE",
}


class ImageTokenizer(nn.Module, ABC):
    """Base of all tokenizers of images of one size.

    Attributes:
        image_size: pixels of each side; of other shapes than squares, height and width.
        height, width: the same as two numbers.
    """

    config_class: type[ModelConfig]

    def __init__(self, config: ModelConfig, image_size: ImageSize) -> None:
        super().__init__()
        self.config = config
        self.image_size = one_form(image_size)
        self.height, self.width = height_width(image_size)

    @property
    @abstractmethod
    def levels(self) -> list[Level]:
        """The grids of codes, coarse to fine."""

    @abstractmethod
    def encode(self, images: Tensor) -> list[Tensor]:
        """Images [B,3,H,W], float in [0,1] -> codes, an int64 [B, h*w] per level (row-major), coarse to fine.

        Raises UserError when the images are not of `image_size`.
        """

    @abstractmethod
    def decode(self, codes: list[Tensor]) -> Tensor:
        """Images of codes: codes as `encode` gives them -> images [B,3,H,W], float32 in [0,1]."""

    @abstractmethod
    def objective(self) -> TokenizerObjective:
        """What the training loop minimises: `forward({"images": uint8 [b,3,H,W]}, step) -> (loss, metrics)`."""

    def save_pretrained(self, directory: Path | str) -> None:
        """Writes model.safetensors and config.json."""
        save_model(self, self.exported_config(), directory)

    def exported_config(self) -> dict[str, object]:
        """Its config.json."""
        return {"image_size": self.image_size, "model": self.config.model_dump(mode="json")}

    @staticmethod
    def from_pretrained(directory: Path | str, device: torch.device | str = "cpu") -> ImageTokenizer:
        """Load what `save_pretrained` wrote, in evaluation mode and in float32, in which codes are made.

        Raises UserError when a file is missing or damaged, or weights and config do not belong together.
        """
        return load_model(directory, "image-tokenizer", ("image_size", "model"), _build_to_load, device=device)

    def _check_images(self, images: Tensor) -> None:
        expected = (3, self.height, self.width)
        if tuple(images.shape[1:]) != expected:
            raise UserError(
                f"the image tokenizer takes images of {told(self.image_size)}, 3 channels; found"
                f" {list(images.shape)}: resize them, or train a tokenizer at that size"
            )
        if not images.is_floating_point():
            raise UserError(
                f"the image tokenizer takes floats in [0, 1], found {images.dtype}: use images.float() / 255"
            )


class TokenizerObjective(Objective):
    """Base of the tokenizers' objectives: a loss between images and reconstructions, and what a kind adds to it.

    Attributes:
        reconstruction: with `image_losses.add_image_losses` it has further terms, of which an adversary is one.
    """

    reconstruction: ReconstructionLoss

    def parameter_groups(self) -> list[ParameterGroup]:
        adversaries = self.reconstruction.adversaries()
        apart = {id(p) for group in adversaries for p in group.parameters}
        own = [p for p in self.parameters() if p.requires_grad and id(p) not in apart]
        return [ParameterGroup(own, undecayed=self.tables()), *adversaries]

    def report(self, step: int) -> None:
        self.reconstruction.report(step)

    def tables(self) -> list[nn.Parameter]:
        """What learns by gradient and is no matrix or kernel: codes' vectors, and those of positions."""
        return []


def check_size(image_size: ImageSize, config: ModelConfig) -> None:
    """Raises UserError when such images cannot be cut into codes."""
    if any(side % config.factor for side in height_width(image_size)):
        raise UserError(
            f"images of {told(image_size)} cannot be cut into codes of {config.factor}×{config.factor}"
            f" pixels: choose an image size that is a multiple of {config.factor}, or other widths or patch_size"
        )


def build(
    model: ModelConfig | dict[str, object], image_size: ImageSize, where: str = "image_tokenizer.model"
) -> ImageTokenizer:
    """A new tokenizer with random weights, of the kind that `model` names. `where` is named in errors.

    Raises UserError when the kind or a key is unknown, or images of that size cannot be cut into codes.
    """
    kind = model.get("kind") if isinstance(model, dict) else model.kind
    if kind not in KINDS:
        raise UserError(f"{where}: unknown kind of image tokenizer {kind!r}; known: {', '.join(sorted(KINDS))}")
    cls: type[ImageTokenizer] = resolve_name(KINDS[kind])
    config = parse_config(cls.config_class, model, where) if isinstance(model, dict) else model
    return cls(config, image_size)


def _build_to_load(values: dict[str, Any], where: str) -> ImageTokenizer:
    """The tokenizer of a config.json, ready for weights with today's names or with those of the version before."""
    tokenizer = build(values["model"], values["image_size"], where)
    tokenizer.register_load_state_dict_pre_hook(_rename_parameters)
    return tokenizer


def _rename_parameters(module: nn.Module, state: dict[str, Tensor], *_: object) -> None:
    if legacy.is_legacy(state):
        assert isinstance(module, ImageTokenizer)
        assert isinstance(module.config, legacy.OldConfig)
        log.info("image tokenizer: weights of the version before; their parameters are renamed while loading")
        current = legacy.with_current_names(state, module.config)
        state.clear()
        state.update(current)
