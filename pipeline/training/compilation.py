"""torch.compile of an objective's blocks (Ansel et al. 2024): one kernel where eager PyTorch starts several.

Each block is compiled by itself, as torchtitan does: blocks of one kind and shape share their code, which takes seconds
where a whole model would take minutes, and names in checkpoints stay what they are. Only training runs it. Evaluation
and sampling call the same blocks with other shapes, each of which would be compiled anew.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

from pipeline.core.compiler import missing_compiler
from pipeline.core.errors import UserError
from pipeline.core.objective import Objective

_Arguments = ParamSpec("_Arguments")
_Output = TypeVar("_Output")
_KINDS_OF_BLOCKS = 64  # compiled variants of one block's code, where torch gives up after 8: resolutions, patterns


def compile_blocks(objective: Objective, device: torch.device) -> None:
    """From now on, the objective's blocks run compiled where gradients are on.

    Raises:
        UserError: the objective has no blocks, or what compiles for `device` is missing.
    """
    blocks = objective.blocks()
    if not blocks:
        raise UserError("training.compile needs a model with blocks, found none: set it to false")
    if missing := missing_compiler(device):
        raise UserError(f"training.compile expected {missing}, found none: install it or set training.compile=false")
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _KINDS_OF_BLOCKS)
    for block in blocks:
        block.forward = _compiled(block.forward)


def _compiled(forward: Callable[_Arguments, _Output]) -> Callable[_Arguments, _Output]:
    compiled = torch.compile(forward, dynamic=False)

    def run(*arguments: _Arguments.args, **named: _Arguments.kwargs) -> _Output:
        chosen = compiled if torch.is_grad_enabled() else forward
        return chosen(*arguments, **named)

    return run
