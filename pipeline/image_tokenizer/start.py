"""An image tokenizer that starts with another one's weights (`image_tokenizer.init_from`), as far as they fit."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from pipeline.core.start_weights import Fit
from pipeline.image_tokenizer.base import ImageTokenizer


@torch.no_grad()
def start_from(tokenizer: ImageTokenizer, folder: Path) -> Fit:
    """Copy what the tokenizer in `folder` has of each tensor of the same name and shape.

    A module with buffers (a quantizer, whose codebook and statistics belong together) is taken whole or not at all.

    Raises:
        UserError: files are missing or damaged.
    """
    theirs, fit = ImageTokenizer.from_pretrained(folder).state_dict(), Fit()
    ours = tokenizer.state_dict()
    reasons = {
        name: f"expected {list(value.shape)}, found {list(theirs[name].shape) if name in theirs else 'none'}"
        for name, value in ours.items()
        if name not in theirs or theirs[name].shape != value.shape
    }
    whole = {prefix for prefix, module in tokenizer.named_modules() if _has_buffers(module)}
    broken = {prefix for prefix in whole if any(name.startswith(f"{prefix}.") for name in reasons)}
    for name, value in ours.items():
        within = next((prefix for prefix in broken if name.startswith(f"{prefix}.")), None)
        if name in reasons or within:
            fit.fresh.append(f"{name}: {reasons.get(name, f'the rest of {within} does not fit')}")
        else:
            value.copy_(theirs[name])
            fit.taken += 1
    return fit


def _has_buffers(module: nn.Module) -> bool:
    return bool(list(module.buffers(recurse=False)))
