"""Activation checkpointing (Chen et al. 2016): a block's activations are computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from pipeline.core.errors import UserError
from pipeline.core.objective import Objective


def checkpoint_activations(objective: Objective) -> None:
    """Keep only the inputs of each of the objective's blocks, and compute the rest again in the backward pass.

    Chen et al. 2016. The random numbers of the first pass are drawn again, so the gradients are the same.
    """
    blocks = objective.blocks()
    if not blocks:
        raise UserError("training.activation_checkpointing needs a model with blocks, found none: set it to false")
    for block in blocks:
        block.forward = _recomputed(block.forward)


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*arguments)
        return checkpoint(forward, *arguments, use_reentrant=False)

    return run
