"""Parameter names of image tokenizers that the version before wrote, put into today's. Kept for one version.

encoder.layers.5.branch.1.weight    →  encoder.resolutions.1.blocks.0.branch.1.weight
to_logits.weight (dvae)             →  quantizers.0.project.weight
quantizers.0.codebooks.0.used       →  quantizers.0.codebooks.0.ema_counts
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from pipeline.config.image_tokenizer_model import DVAEConfig, VQVAE2Config, VQVAEConfig
from pipeline.config.quantizers import CodebookConfig

OldConfig = DVAEConfig | VQVAEConfig | VQVAE2Config


def is_legacy(state: Mapping[str, Tensor]) -> bool:
    return "encoder.layers.1.weight" in state


def with_current_names(state: Mapping[str, Tensor], config: OldConfig) -> dict[str, Tensor]:
    """A state dict of the version before, with today's names; names that no rule knows stay as they are."""
    modules = renamed_modules(config)
    return {_renamed(name, modules): value for name, value in state.items()}


def renamed_modules(config: OldConfig) -> dict[str, str]:
    """Old name → today's, of modules and of single parameters and buffers."""
    names = _encoder(config) | _decoder(config)
    if config.kind == "dvae":
        names |= {"to_logits": "quantizers.0.project"}
        names |= {name: f"quantizers.0.{name}" for name in ("codebook", "log_scale")}
    for i, quantizer in enumerate(config.quantizers):
        for j in range(quantizer.depth if isinstance(quantizer, CodebookConfig) else 0):
            book = f"quantizers.{i}.codebooks.{j}"
            names |= {f"{book}.used": f"{book}.ema_counts", f"{book}.sums": f"{book}.ema_sums"}
    return names


def _encoder(config: OldConfig) -> dict[str, str]:
    names, index = {"encoder.layers.1": "encoder.stem"}, 2  # layer 0 folds pixels into channels
    for i in range(len(config.widths)):
        if i:
            names[f"encoder.layers.{index + 1}"] = f"encoder.resolutions.{i}.down.conv"  # behind the pooling
            index += 2
        for j in range(_blocks(config)):
            names[f"encoder.layers.{index + j}"] = f"encoder.resolutions.{i}.blocks.{j}"
        index += _blocks(config)
    return names


def _decoder(config: OldConfig) -> dict[str, str]:
    names, index = {"decoder.layers.0": "decoder.stem"}, 1
    for i in range(len(config.widths)):
        if i:
            names[f"decoder.layers.{index + 1}"] = f"decoder.resolutions.{i - 1}.up.conv"  # behind the upsampling
            index += 2
        for j in range(_blocks(config)):
            names[f"decoder.layers.{index + j}"] = f"decoder.resolutions.{i}.blocks.{j}"
        index += _blocks(config)
    return names | {f"decoder.layers.{index + 1}": "decoder.head"}  # behind a ReLU


def _blocks(config: OldConfig) -> int:
    return 1 if config.block == "ode" else config.blocks


def _renamed(name: str, modules: Mapping[str, str]) -> str:
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        if (today := modules.get(".".join(parts[:length]))) is not None:
            return ".".join([today, *parts[length:]])
    return name
