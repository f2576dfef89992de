"""What a training engine is: `accelerate.py` (DistributedDataParallel) and `deepspeed.py` (ZeRO) are the two.

An engine owns the wrapped model, the optimizer and the precision; the loop in `pipeline/training/trainer.py` owns
everything else. Both run the same code on CPU and GPU.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from pipeline.core import distributed
from pipeline.core.errors import UserError
from pipeline.core.initial_values import InitialValues
from pipeline.core.objective import Objective
from pipeline.training.checkpoint_files import Files
from pipeline.training.sharded_state import ShardedState, TensorShard

Batch = dict[str, Tensor]
Metrics = dict[str, Tensor]


@dataclass(frozen=True)
class Update:
    """The outcome of one optimizer update, on the device: reading it waits for the device."""

    gradient_norm: Tensor  # before clipping; a scalar
    applied: Tensor  # a scalar; false: a gradient was not finite, the weights are as before


@dataclass(frozen=True)
class Start:
    """What the parameters of a model that was built without memory begin with."""

    initial: InitialValues
    drawn: bool  # False: a checkpoint will give them their values


class Engine(Protocol):
    """A model in training. `accumulate` is called once per micro-batch, `update` once per step, on all processes."""

    objective: Objective
    model: nn.Module  # what to call for evaluation, on all processes together

    def accumulate(self, batch: Batch, step: int, loss_scale: float, last: bool) -> Metrics:
        """Forward and backward pass of one micro-batch; its gradients are added, times `loss_scale`.

        Args:
            batch: on this process's device.
            step: 0-based.
            loss_scale: 1 / micro-batches per step, so that a step minimises the mean over its micro-batches.
            last: of the step; then gradients are averaged over processes.

        Returns:
            "loss" and the objective's metrics, of this process's micro-batch.
        """

    def update(self, learning_rate_factor: float) -> Update:
        """Clip gradients, step the optimizer at `learning_rate_factor` times its peak rates, clear gradients."""

    def autocast(self) -> AbstractContextManager[object]:
        """The training precision, for evaluation."""

    def local_parameters(self) -> dict[str, Tensor]:
        """This process's float32 weights, as its optimizer updates them, by name, and what else is averaged.

        Not a copy. Whole parameters, or with ZeRO the flat part of each that lies in this process's slice; on
        accelerate's engine `Objective.averaged_buffers`, too.
        """

    def sync_parameters(self) -> None:
        """Collective: make the model compute with what was written to `local_parameters`."""

    @property
    def in_step(self) -> bool:
        """Whether no process has the whole model, so that all must call the same of its modules, in the same order."""

    def gathered_outside_blocks(self) -> AbstractContextManager[None]:
        """Collective; inside, what a model reads of its parameters is there, whichever of its methods are called.

        Those within the objective's blocks, where these are called as modules. `in_step` says who must call.
        """

    def local_shards(self, values: dict[str, Tensor]) -> list[TensorShard]:
        """What this process writes to a checkpoint of `values`, which are shaped like `local_parameters`."""

    def read_shards(self, values: dict[str, Tensor], saved: ShardedState) -> None:
        """Read into `values`, which are shaped like `local_parameters`, what `local_shards` gave on all processes."""

    def checkpoint_files(self, with_optimizer: bool = True) -> Files:
        """This process's files of model and optimizer, not copied. See `pipeline/training/checkpoint.py`."""

    def load(self, directory: Path) -> None:
        """Collective: read what `checkpoint_files` gave. Raises UserError when it is of another model or version."""


def shards_of_replicated(values: dict[str, Tensor], all_of_them: bool = False) -> list[TensorShard]:
    """The tensors that this process writes of those that all have in full: every n-th on n processes, or all."""
    shards = [TensorShard(name, 0, value) for name, value in values.items()]
    return shards if all_of_them else shards[distributed.rank() :: distributed.world_size()]


def expect_all_processes(found: int) -> None:
    """Raises RuntimeError when the engine sees fewer processes than the launcher started."""
    expected = int(os.environ.get("WORLD_SIZE", 1))
    if found != expected:
        raise RuntimeError(
            f"the engine sees {found} processes, the launcher started {expected}: each would train independently"
        )


def shapes_of(module: nn.Module) -> dict[str, list[int]]:
    """The shape of each parameter by name."""
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
