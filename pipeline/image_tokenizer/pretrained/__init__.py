"""Image tokenizers of other libraries: their weights, in a VQGAN or a dVAE of ours.

    tokenizer = load_pretrained(PretrainedTokenizerConfig(library="llamagen", path="vq_ds16_c2i.pt"), image_size=256)

weights      the tensors of a file or folder, by their names there
names        what each library calls the modules of its VQGAN; vqgan: which model that is, and its tensors
still_frame  what the layers in time of Emu3's tokenizer are for an image
openai       OpenAI's dVAE

The shape of the model is read from the shapes of its weights, so no config beside them is needed, and what does not fit
is named.
"""

from __future__ import annotations

import logging

import torch

from pipeline.config.image_tokenizer import ImageTokenizerConfig, PretrainedTokenizerConfig
from pipeline.config.image_tokenizer_model import ModelConfig
from pipeline.core.image_size import ImageSize
from pipeline.image_tokenizer.base import ImageTokenizer, build
from pipeline.image_tokenizer.pretrained import openai, vqgan
from pipeline.image_tokenizer.pretrained.weights import Weights

log = logging.getLogger(__name__)

_STARTED = "quantizers.0.codebooks.0.started"


def new_tokenizer(section: ImageTokenizerConfig, image_size: ImageSize) -> ImageTokenizer:
    """What the stage begins with: random weights, or those of `pretrained`."""
    if section.pretrained:
        return load_pretrained(section.pretrained, image_size)
    return build(section.model, image_size)


def load_pretrained(config: PretrainedTokenizerConfig, image_size: ImageSize) -> ImageTokenizer:
    """The tokenizer in evaluation mode, with gradients only for what `config.train` names.

    Raises UserError when there are no weights, or they are not of such a model, or images of that size do not fit.
    """
    weights, model = _opened(config)
    tokenizer = build(model, image_size, where=config.path)
    own = tokenizer.state_dict()
    tensors = openai.tensors(weights, own) if config.library == "openai" else vqgan.tensors(weights, model, own)
    weights.check_all_taken()
    if _STARTED in own:
        tensors[_STARTED] = torch.ones_like(own[_STARTED])  # k-means does not begin anew
    tokenizer.load_state_dict(own | {name: value.to(own[name].dtype) for name, value in tensors.items()})
    _choose_gradients(tokenizer, config.train)
    [level] = tokenizer.levels
    side = tokenizer.width // level.width
    log.info("%s: %s's tokenizer, %d×%d pixels a code, %d codes", config.path, config.library, side, side, level[2])
    return tokenizer.eval()


def model_of(section: ImageTokenizerConfig) -> ModelConfig:
    """The model of the section, or that of `pretrained`'s weights."""
    return _opened(section.pretrained)[1] if section.pretrained else section.model


def _opened(config: PretrainedTokenizerConfig) -> tuple[Weights, ModelConfig]:
    if config.library == "openai":
        weights = Weights.read(config, "dVAE", openai.PREFIXES, ())
        return weights, openai.model_of(weights)
    weights = Weights.read(config, "VQGAN", *vqgan.around(config.library))
    return weights, vqgan.model_of(weights)


def _choose_gradients(tokenizer: ImageTokenizer, train: str | None) -> None:
    for name, parameter in tokenizer.named_parameters():
        parameter.requires_grad_(train == "all" or (train == "decoder" and name.startswith("decoder.")))
