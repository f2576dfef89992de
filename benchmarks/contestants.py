"""Tokenizers in training, under one interface: ours of any config, and two peers. What benchmarks/tokenizers.py trains.

A peer that is not installed, or not where benchmarks/peers.py looks for it, cannot be built.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config.training import TrainingConfig
from pipeline.core.objective import ParameterGroup
from pipeline.image_tokenizer.base import build
from pipeline.training.optimizer import build_adamw, build_optimizer

SIZE, K, NOMINAL_STEPS = 32, 1024, 10_000  # pixels on each side; codes; steps that schedules are written for


class Contestant(ABC):
    """A tokenizer in training: a loss to minimise; then codes of images, and images of codes."""

    module: nn.Module  # what is trained
    sizes: list[int]  # of each level's codebook

    @abstractmethod
    def loss(self, images: Tensor, progress: float) -> Tensor:
        """The loss of uint8 images [B,3,H,W], at `progress` in [0,1] of the training."""

    @abstractmethod
    def encode(self, images: Tensor) -> list[Tensor]: ...

    @abstractmethod
    def decode(self, codes: list[Tensor]) -> Tensor: ...

    def optimizer(self, config: TrainingConfig) -> torch.optim.Optimizer:
        return build_adamw([ParameterGroup(list(self.module.parameters()))], config)

    def look_ahead(self, micro_batches: Sequence[Tensor], progress: float) -> None:
        """What a loss must know of a whole step of several micro-batches [b,3,H,W]."""
        return

    def after_update(self, applied: bool) -> None:
        return


class Ours(Contestant):
    """A tokenizer of this project, from its config."""

    def __init__(self, model: dict[str, object], size: int = SIZE) -> None:
        self.tokenizer = build(model, size)
        self.module = self.objective = self.tokenizer.objective()
        self.sizes = [level.codebook_size for level in self.tokenizer.levels]

    def loss(self, images: Tensor, progress: float) -> Tensor:
        loss, _ = self.module({"images": images}, int(progress * NOMINAL_STEPS))
        return loss

    def encode(self, images: Tensor) -> list[Tensor]:
        return self.tokenizer.encode(images)

    def decode(self, codes: list[Tensor]) -> Tensor:
        return self.tokenizer.decode(codes)

    def look_ahead(self, micro_batches: Sequence[Tensor], progress: float) -> None:
        self.objective.look_ahead([{"images": images} for images in micro_batches], int(progress * NOMINAL_STEPS))

    def after_update(self, applied: bool) -> None:
        self.objective.after_update(applied)

    def optimizer(self, config: TrainingConfig) -> torch.optim.Optimizer:
        return build_optimizer(self.objective, config, replicated=True)


class DallePytorch(Contestant):
    """`DiscreteVAE` of dalle-pytorch, its defaults but for sizes; temperature falls as in its training script."""

    def __init__(self, size: int = SIZE, codes: int = K, layers: int = 2, width: int = 96) -> None:
        from benchmarks.peers import dalle_pytorch

        found = dalle_pytorch()
        if found is None:
            raise ModuleNotFoundError("dalle-pytorch")
        self.module = self.vae = found.DiscreteVAE(
            image_size=size, num_tokens=codes, codebook_dim=96, num_layers=layers, num_resnet_blocks=2, hidden_dim=width
        )
        self.sizes = [codes]

    def loss(self, images: Tensor, progress: float) -> Tensor:
        return self.vae(images.float() / 255, return_loss=True, temp=max(0.5, 1.0 - 0.5 * progress))

    def encode(self, images: Tensor) -> list[Tensor]:
        return [self.vae.get_codebook_indices(images)]

    def decode(self, codes: list[Tensor]) -> Tensor:
        return (self.vae.decode(codes[0]).float() * 0.5 + 0.5).clamp(0, 1)


class PlainVectorQuantize(Contestant):
    """A convolutional auto-encoder around vector-quantize-pytorch's `VectorQuantize`, as in its examples."""

    def __init__(self) -> None:
        from vector_quantize_pytorch import VectorQuantize

        self.encoder = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1), nn.MaxPool2d(2), nn.GELU(),
            nn.Conv2d(32, 64, 3, padding=1), nn.MaxPool2d(2), nn.Conv2d(64, 32, 3, padding=1),
        )  # fmt: skip
        self.quantizer = VectorQuantize(
            dim=32, codebook_size=K, accept_image_fmap=True, kmeans_init=True, threshold_ema_dead_code=2
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(32, 64, 3, padding=1), nn.Upsample(scale_factor=2), nn.Conv2d(64, 32, 3, padding=1), nn.GELU(),
            nn.Upsample(scale_factor=2), nn.Conv2d(32, 3, 3, padding=1),
        )  # fmt: skip
        self.module = nn.ModuleList([self.encoder, self.quantizer, self.decoder])
        self.sizes = [K]

    def loss(self, images: Tensor, progress: float) -> Tensor:
        scaled = images.float() / 127.5 - 1
        z, _, commitment = self.quantizer(self.encoder(scaled))
        return F.mse_loss(self.decoder(z).float(), scaled) + commitment

    def encode(self, images: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return [self.quantizer(self.encoder(2 * images - 1))[1].flatten(1)]

    def decode(self, codes: list[Tensor]) -> Tensor:
        side = math.isqrt(codes[0].shape[1])
        with torch.no_grad():
            z = self.quantizer.get_output_from_indices(codes[0].view(-1, side, side))
            z = z if z.shape[1] == 32 else z.permute(0, 3, 1, 2)
            return (self.decoder(z).float() * 0.5 + 0.5).clamp(0, 1)


PEERS: dict[str, Callable[[], Contestant]] = {
    "dalle-pytorch DiscreteVAE": DallePytorch,
    "vector-quantize-pytorch": PlainVectorQuantize,
}
