"""Section `image_tokenizer` of the pipeline config: which tokenizer, its loss, its training.

Knows no torch, so that the command line and the Slurm layer can read configs in milliseconds.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from pipeline.config.base import Config, added, operational
from pipeline.config.image_losses import AdversarialConfig, PerceptualConfig
from pipeline.config.image_tokenizer_model import DVAEConfig, ModelConfig
from pipeline.config.quantizers import levels_of
from pipeline.config.training import TrainingConfig


class PretrainedTokenizerConfig(Config):
    """An image tokenizer of another library, whose weights say what shape it has."""

    library: Literal["transformers", "diffusers", "openai", "taming", "llamagen"] = Field(
        description="transformers: Janus's, Chameleon's and Emu3's; diffusers: VQModel; openai: DALL-E's dVAE;"
        " taming: VQModel and GumbelVQ, also latent-diffusion's"
    )
    path: str = Field(
        min_length=1,
        description="folder or file: safetensors, or what torch.load(weights_only=True) reads; its content, not this"
        " path, decides whether a stage is up to date",
    )
    train: Literal["decoder", "all"] | None = Field(None, description="null: nothing, the stage takes it as it is")


class ImageTokenizerConfig(Config):
    """What the image-tokenizer stage trains."""

    model: ModelConfig = DVAEConfig()
    init_from: str | None = added(
        None,
        min_length=1,
        description="RUN, EXPORT or FOLDER: start with the weights of the image tokenizer there, as far as they fit;"
        " their content, not this path, decides whether a stage is up to date. null: start fresh",
    )
    pretrained: PretrainedTokenizerConfig | None = added(
        None, description="in place of `model`: an image tokenizer of another library, as it is or trained further"
    )
    training: TrainingConfig
    perceptual: PerceptualConfig | None = None
    adversarial: AdversarialConfig | None = None
    random_crop: float = added(
        1.0,
        gt=0,
        le=1,
        description="smallest side of a random part of a training image, resized back, / side of the image; each epoch"
        " takes another; 1: always the whole",
    )
    random_flip: bool = added(
        False,
        description="half of the training images, others each epoch, mirrored left to right; not where they hold text",
    )
    usage_floor: float = operational(
        0.1, ge=0, le=1, description="a warning says what to try when fewer of the codes occur on the validation split"
    )

    @field_validator("model", mode="before")
    @classmethod
    def _model_that_is_taken_out(cls, model: object) -> object:
        """`image_tokenizer.model=null` on a command line: what a file would leave out."""
        return DVAEConfig() if model is None else model

    @model_validator(mode="after")
    def _check_pretrained(self) -> ImageTokenizerConfig:
        if self.pretrained and self.model != DVAEConfig():  # the config of a run names defaults, too
            raise ValueError("pretrained brings its own model: leave `model` out (or null), or `pretrained`")
        if self.pretrained and self.init_from:
            raise ValueError("pretrained brings its own weights: leave `init_from` out, or `pretrained`")
        return self

    @property
    def levels(self) -> int:
        """Grids of codes; those of other libraries have one."""
        return 1 if self.pretrained else sum(map(levels_of, self.model.quantizers))

    @property
    def kind(self) -> str:
        """What is trained or taken, in a word."""
        if self.pretrained is None:
            return self.model.kind
        return f"{self.pretrained.library}'s {'dVAE' if self.pretrained.library == 'openai' else 'VQGAN'}"

    @model_validator(mode="after")
    def _check_start(self) -> ImageTokenizerConfig:
        for name, loss in (("perceptual", self.perceptual), ("adversarial", self.adversarial)):
            if loss and loss.start_step >= self.training.steps:
                raise ValueError(f"{name}.start_step must be below training.steps ({self.training.steps})")
        return self
