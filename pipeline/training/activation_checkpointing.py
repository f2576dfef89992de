"""Activation checkpointing (Chen et al. 2016): a block's activations are computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pipeline.core.errors import UserError


def checkpoint_activations(objective: nn.Module) -> None:
    """Keep only the inputs of each of the model's `blocks`, and compute the rest again in the backward pass.

    Chen et al. 2016. The random numbers of the first pass are drawn again, so the gradients are the same.
    """
    blocks = blocks_of(objective)
    if not blocks:
        raise UserError("training.activation_checkpointing needs a model with blocks, found none: set it to false")
    for block in blocks:
        block.forward = _recomputed(block.forward)


def blocks_of(objective: nn.Module) -> list[nn.Module]:
    """The members of every list of modules that is called `blocks`."""
    lists = [module for name, module in objective.named_modules() if name.rpartition(".")[2] == "blocks"]
    return [block for module in lists for block in module.children()]


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*arguments)
        return checkpoint(forward, *arguments, use_reentrant=False)

    return run
