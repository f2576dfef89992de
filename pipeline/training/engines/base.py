"""What a training engine is. Two do it: accelerate (DDP, `accelerate.py`) and DeepSpeed (ZeRO, `deepspeed.py`).

An engine owns the wrapped model, the optimizer and the precision; the loop in `pipeline/training/trainer.py` owns
everything else. Both run the same code on CPU and GPU.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from pipeline.core import distributed
from pipeline.core.errors import UserError
from pipeline.core.objective import Objective
from pipeline.training.sharded_state import ShardedState, TensorShard

Batch = dict[str, Tensor]
Metrics = dict[str, Tensor]


@dataclass(frozen=True)
class Update:
    """What became of one optimizer update."""

    gradient_norm: float  # before clipping
    applied: bool  # False: a gradient was not finite, the weights are as before


class Engine(Protocol):
    """A model in training. `accumulate` is called once a micro-batch, `update` once a step."""

    objective: Objective
    model: nn.Module  # what to call for evaluation, on all processes together

    def accumulate(self, batch: Batch, step: int, share: float, last: bool) -> Metrics:
        """Forward and backward of one of 1 / `share` micro-batches. Returns the loss and the objective's metrics."""

    def update(self, schedule: float) -> Update:
        """The optimizer's step, at `schedule` times its peak learning rate."""

    def autocast(self) -> AbstractContextManager[Any]:
        """The training precision, for evaluation."""

    def held(self) -> dict[str, Tensor]:
        """What this process holds of each parameter, by name: all of it, or with ZeRO-3 a flat shard. Its memory."""

    def refresh(self) -> None:
        """Collective, after a write to what `held` gave."""

    def whole(self) -> AbstractContextManager[None]:
        """Collective; inside, `objective` is a plain module with whole weights that one process may use alone."""

    def finish(self) -> None:
        """Collective; the training is over, `objective` stays whole."""

    def local_shards(self, values: dict[str, Tensor]) -> list[TensorShard]:
        """What this process writes to a checkpoint of values shaped like `held`."""

    def fill(self, values: dict[str, Tensor], pieces: ShardedState) -> None:
        """Read values shaped like `held` from a checkpoint."""

    def save(self, directory: Path) -> None:
        """Collective: every rank writes its part of model and optimizer."""

    def load(self, directory: Path) -> None: ...


def share_of_whole(values: dict[str, Tensor], all_of_it: bool = False) -> list[TensorShard]:
    """Of tensors that every process holds whole, those that this one writes."""
    pieces = [TensorShard(name, 0, value) for name, value in values.items()]
    return pieces if all_of_it else pieces[distributed.rank() :: distributed.world_size()]


def expect_all_processes(found: int) -> None:
    expected = int(os.environ.get("WORLD_SIZE", 1))
    if found != expected:
        raise RuntimeError(f"the engine sees {found} processes, the launcher started {expected}: they train apart")


def shapes_of(module: nn.Module) -> dict[str, list[int]]:
    return {name: list(parameter.shape) for name, parameter in module.named_parameters()}


def expect_same_shapes(expected: dict[str, list[int]], found: dict[str, list[int]], where: Path) -> None:
    """Raises UserError when a checkpoint is of another model."""
    if expected == found:
        return
    name = min(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))
    shapes = [f"{shape[name]}" if name in shape else "none" for shape in (expected, found)]
    raise UserError(
        f"the checkpoint {where} is of another model: expected {name} of shape {shapes[0]}, found {shapes[1]}:"
        f" use the config that made it, or remove {where.parent} to start over"
    )
