"""The loss between images and reconstructions with all its optional terms: perceptual, adversarial.

An objective knows one of these as `reconstruction` (losses.py: `ReconstructionLoss`); none of this is exported.
"""

from __future__ import annotations

from torch import Tensor

from pipeline.config.image_losses import AdversarialConfig, PerceptualConfig
from pipeline.core.image_size import ImageSize
from pipeline.core.objective import ParameterGroup
from pipeline.image_tokenizer.base import TokenizerObjective
from pipeline.image_tokenizer.discriminator import Adversary
from pipeline.image_tokenizer.losses import ReconstructionLoss, output_to_pixels
from pipeline.image_tokenizer.perceptual import Perceptual


class ImageLosses(ReconstructionLoss):
    """Pixels' loss + weight · perceptual distance + the adversary's part."""

    def __init__(
        self,
        kind: str,
        image_size: ImageSize,
        perceptual: PerceptualConfig | None,
        adversarial: AdversarialConfig | None,
    ) -> None:
        super().__init__(kind)
        self.perceptual = Perceptual(perceptual, image_size) if perceptual else None
        self.adversary = Adversary(adversarial, image_size) if adversarial else None

    def forward(self, images: Tensor, output: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = super().forward(images, output, step)
        rebuilt = output_to_pixels(self.kind, output)
        if self.perceptual:
            distance = self.perceptual(images, rebuilt, step)
            loss = loss + self.perceptual.config.weight * distance
            metrics["perceptual"] = distance.detach()
        if self.adversary:
            added, more = self.adversary(images, rebuilt, output, loss, step)
            loss, metrics = loss + added, metrics | more
        return loss, metrics

    def report(self, step: int) -> None:
        if self.adversary:
            self.adversary.guard.report(step)

    def adversaries(self) -> list[ParameterGroup]:
        return [self.adversary.discriminator.parameter_group()] if self.adversary else []


def add_image_losses(
    objective: TokenizerObjective,
    image_size: ImageSize,
    perceptual: PerceptualConfig | None,
    adversarial: AdversarialConfig | None,
) -> None:
    """Put the optional terms into a tokenizer's objective. Without any, it stays as it is."""
    if perceptual or adversarial:
        objective.reconstruction = ImageLosses(objective.reconstruction.kind, image_size, perceptual, adversarial)
