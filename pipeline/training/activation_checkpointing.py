"""Activation checkpointing (Chen et al. 2016): activations are computed again in the backward pass.

Of whole blocks, or of attention alone, which keeps most for what it costs to compute (Korthikanti et al. 2022,
section 5: selective recomputation): scores, where attention is not fused, and queries, keys and values.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, ParamSpec, TypeVar, cast

import torch
from torch.utils.checkpoint import checkpoint

from pipeline.core.errors import UserError
from pipeline.core.objective import Objective

_Arguments = ParamSpec("_Arguments")
_Output = TypeVar("_Output")


def checkpoint_activations(objective: Objective, what: Literal["attention", "block"] = "block") -> None:
    """Keep only the inputs of each of the objective's blocks, or attention layers, and compute the rest again.

    The random numbers of the first pass are drawn again, so the gradients are the same.

    Raises:
        UserError: the objective has none.
    """
    layers = objective.blocks() if what == "block" else objective.attention_layers()
    if not layers:
        named = "blocks" if what == "block" else "attention"
        raise UserError(
            f"training.activation_checkpointing {what} needs a model with {named}, found none: set it to"
            f" {'block or none' if objective.blocks() else 'none'}"
        )
    for layer in layers:
        layer.forward = _recomputed(layer.forward)


def _recomputed(forward: Callable[_Arguments, _Output]) -> Callable[_Arguments, _Output]:
    def run(*arguments: _Arguments.args, **named: _Arguments.kwargs) -> _Output:
        if not torch.is_grad_enabled():
            return forward(*arguments, **named)
        return cast(_Output, checkpoint(partial(forward, **named), *arguments, use_reentrant=False))

    return run
