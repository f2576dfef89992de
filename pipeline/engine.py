"""Two training engines behind one interface: accelerate (DDP, here) and DeepSpeed (ZeRO, deepspeed_engine.py).

An engine owns the wrapped model, the optimizer and the precision; the loop in `pipeline/loop.py` owns
everything else. Both run the same code on CPU and GPU.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline import distributed
from pipeline.errors import UserError
from pipeline.optim import build_adamw, rivals, set_learning_rates
from pipeline.pieces import Piece, Pieces
from pipeline.train_config import DeepSpeedConfig, TrainingConfig

Batch = dict[str, Tensor]
Metrics = dict[str, Tensor]


@dataclass(frozen=True)
class Update:
    """What became of one optimizer update."""

    gradient_norm: float  # before clipping
    applied: bool  # False: a gradient was not finite, the weights are as before


class Engine(Protocol):
    """A model in training. `accumulate` is called once a micro-batch, `update` once a step."""

    objective: nn.Module
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

    def pieces_of(self, values: dict[str, Tensor]) -> list[Piece]:
        """What this process writes to a checkpoint of values shaped like `held`."""

    def fill(self, values: dict[str, Tensor], pieces: Pieces) -> None:
        """Read values shaped like `held` from a checkpoint."""

    def save(self, directory: Path) -> None:
        """Collective: every rank writes its part of model and optimizer."""

    def load(self, directory: Path) -> None: ...


def build_engine(
    kind: Literal["accelerate", "deepspeed"],
    objective: nn.Module,
    training: TrainingConfig,
    deepspeed: DeepSpeedConfig | None,
    directory: Path,
) -> Engine:
    _check_precision(training)
    if training.activation_checkpointing:
        checkpoint_activations(objective)
    if kind == "accelerate":
        return AccelerateEngine(objective, training)
    from pipeline.deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine(objective, training, deepspeed or DeepSpeedConfig(), directory)


def accumulation_steps(training: TrainingConfig) -> int:
    """Micro-batches a step on each process.

    Raises:
        UserError: the processes do not divide the batch, or micro-batches do not divide a process's share.
    """
    processes = distributed.world_size()
    if training.batch_size % processes:
        raise UserError(
            f"expected a batch_size that {processes} processes divide, found {training.batch_size}:"
            f" set training.batch_size to a multiple of {processes}"
        )
    share = training.batch_size // processes
    micro = training.micro_batch_size or share
    if share % micro:
        raise UserError(
            f"expected a micro_batch_size that divides each process's {share} samples, found {micro}:"
            f" set training.micro_batch_size to a divisor of {share}"
        )
    return share // micro


class AccelerateEngine:
    """DistributedDataParallel through accelerate; one copy of the optimizer on every process."""

    def __init__(self, objective: nn.Module, training: TrainingConfig) -> None:
        from accelerate import Accelerator

        if training.optimizer != "adamw":
            raise UserError(f"expected training.optimizer adamw for a tokenizer, found {training.optimizer}: set adamw")
        precision = "no" if training.precision == "fp32" else training.precision
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=precision)
        expect_all_processes(self.accelerator.num_processes)
        self.objective = self.model = objective
        self.training = training
        self._rivals = rivals(objective)
        apart = {id(p) for rival in self._rivals for p in rival.parameters()}
        self._own = [p for p in objective.parameters() if id(p) not in apart]
        self._wrapped, self.optimizer = self.accelerator.prepare(objective, build_adamw(objective, training))

    def accumulate(self, batch: Batch, step: int, share: float, last: bool) -> Metrics:
        with nullcontext() if last else self.accelerator.no_sync(self._wrapped):
            loss, metrics = self._wrapped(batch, step)
            self.accelerator.backward(loss * share)
        return {"loss": loss.detach()} | metrics

    def update(self, schedule: float) -> Update:
        set_learning_rates(self.optimizer, schedule)
        limit = self.training.gradient_clipping or float("inf")
        norm = float(self.accelerator.clip_grad_norm_(self._own, limit))
        # A discriminator is clipped apart: its gradient's length must not decide how far the model itself steps.
        apart = [float(torch.nn.utils.clip_grad_norm_(rival.parameters(), limit)) for rival in self._rivals]
        finite = all(map(math.isfinite, [norm, *apart]))
        if finite or self.accelerator.scaler is not None:  # the fp16 scaler must see overflows to adapt
            self.optimizer.step()
        applied = bool(finite and not self.optimizer.step_was_skipped)
        self.optimizer.zero_grad(set_to_none=True)
        return Update(norm, applied)

    def autocast(self) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = self.accelerator.autocast()
        return context

    def held(self) -> dict[str, Tensor]:
        return {name: parameter.data for name, parameter in self.objective.named_parameters()}

    def refresh(self) -> None:
        pass

    def whole(self) -> AbstractContextManager[None]:
        return nullcontext()

    def finish(self) -> None:
        pass

    def pieces_of(self, values: dict[str, Tensor]) -> list[Piece]:
        return share_of_whole(values)

    def fill(self, values: dict[str, Tensor], pieces: Pieces) -> None:
        for name, value in values.items():
            pieces.fill(name, 0, value.view(-1))

    def save(self, directory: Path) -> None:
        if not distributed.is_main():
            return
        state = {"model": self.objective.state_dict(), "optimizer": self.optimizer.state_dict()}
        if self.accelerator.scaler is not None:
            state["scaler"] = self.accelerator.scaler.state_dict()
        torch.save(state, directory / "training.pt")

    def load(self, directory: Path) -> None:
        state = torch.load(directory / "training.pt", map_location=distributed.device(), weights_only=True)
        _load_weights(self.objective, state["model"], directory)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])


def share_of_whole(values: dict[str, Tensor], all_of_it: bool = False) -> list[Piece]:
    """Of tensors that every process holds whole, those that this one writes."""
    pieces = [Piece(name, 0, value) for name, value in values.items()]
    return pieces if all_of_it else pieces[distributed.rank() :: distributed.world_size()]


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


def expect_all_processes(found: int) -> None:
    expected = int(os.environ.get("WORLD_SIZE", 1))
    if found != expected:
        raise RuntimeError(f"the engine sees {found} processes, the launcher started {expected}: they train apart")


def _check_precision(training: TrainingConfig) -> None:
    if training.precision == "fp16" and not torch.cuda.is_available():
        raise UserError("expected training.precision bf16 or fp32 on CPU, found fp16: set training.precision=bf16")


def _load_weights(module: nn.Module, state: dict[str, Tensor], where: Path) -> None:
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise UserError(f"the checkpoint {where} is of another model: {first}") from error


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
