"""An image tokenizer that starts with another one's weights (`image_tokenizer.init_from`), as far as they fit."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config.image_tokenizer_model import ViTConfig
from pipeline.core.start_weights import Fit
from pipeline.image_tokenizer.base import ImageTokenizer


@torch.no_grad()
def start_from(tokenizer: ImageTokenizer, folder: Path) -> Fit:
    """Copy what the tokenizer in `folder` has of each tensor of the same name and shape.

    Positions of a grid of another size are interpolated (Dosovitskiy et al. 2021, section 3.2). A module with buffers
    (a quantizer, whose codebook and statistics belong together) is taken whole or not at all.

    Raises:
        UserError: files are missing or damaged.
    """
    other, fit = ImageTokenizer.from_pretrained(folder), Fit()
    theirs, ours = other.state_dict(), tokenizer.state_dict()
    if isinstance(tokenizer.config, ViTConfig) and isinstance(other.config, ViTConfig):
        before, now = other.config.heads, tokenizer.config.heads
        if before != now:  # weights fit, and mean something else
            fit.changed.append(f"heads: {before} -> {now}")
    for name in [name for name in ours if name in theirs]:
        if name.endswith(".positions") and _other_grid(theirs[name], ours[name]):
            fit.changed.append(f"{name}: a grid of {_told(theirs[name])} to {_told(ours[name])}, interpolated")
            theirs[name] = _resized(theirs[name], ours[name])
    reasons = {
        name: f"expected {list(value.shape)}, found {list(theirs[name].shape) if name in theirs else 'none'}"
        for name, value in ours.items()
        if name not in theirs or theirs[name].shape != value.shape
    }
    whole = {prefix for prefix, module in tokenizer.named_modules() if _has_buffers(module)}
    broken = {prefix for prefix in whole if any(name.startswith(f"{prefix}.") for name in reasons)}
    for name in list(ours):
        within = next((prefix for prefix in broken if name.startswith(f"{prefix}.")), None)
        if name in reasons or within:
            fit.fresh.append(f"{name}: {reasons.get(name, f'the rest of {within} does not fit')}")
        else:
            ours[name] = theirs[name]
            fit.taken += 1
    tokenizer.load_state_dict(ours)  # not copied tensor by tensor: a codebook learns here that it has started
    return fit


def _other_grid(theirs_Dhw: Tensor, ours_Dhw: Tensor) -> bool:
    return theirs_Dhw.shape[0] == ours_Dhw.shape[0] and theirs_Dhw.shape != ours_Dhw.shape


def _resized(theirs_Dhw: Tensor, ours_Dhw: Tensor) -> Tensor:
    size = (ours_Dhw.shape[1], ours_Dhw.shape[2])
    return F.interpolate(theirs_Dhw[None], size, mode="bicubic", align_corners=False)[0]


def _told(grid_Dhw: Tensor) -> str:
    return "×".join(map(str, grid_Dhw.shape[1:]))


def _has_buffers(module: nn.Module) -> bool:
    return bool(list(module.buffers(recurse=False)))
