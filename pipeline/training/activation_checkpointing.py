"""Activation checkpointing (Chen et al. 2016): a block's activations are computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ParamSpec, TypeVar, cast

import torch
from torch.utils.checkpoint import checkpoint

from pipeline.core.errors import UserError
from pipeline.core.objective import Objective

_Arguments = ParamSpec("_Arguments")
_Output = TypeVar("_Output")


def checkpoint_activations(objective: Objective) -> None:
    """Keep only the inputs of each of the objective's blocks, and compute the rest again in the backward pass.

    The random numbers of the first pass are drawn again, so the gradients are the same.

    Raises:
        UserError: the objective has no blocks.
    """
    blocks = objective.blocks()
    if not blocks:
        raise UserError("training.activation_checkpointing needs a model with blocks, found none: set it to false")
    for block in blocks:
        block.forward = _recomputed(block.forward)


def _recomputed(forward: Callable[_Arguments, _Output]) -> Callable[_Arguments, _Output]:
    def run(*arguments: _Arguments.args, **named: _Arguments.kwargs) -> _Output:
        if not torch.is_grad_enabled():
            return forward(*arguments, **named)
        return cast(_Output, checkpoint(partial(forward, **named), *arguments, use_reentrant=False))

    return run
