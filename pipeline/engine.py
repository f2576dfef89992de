"""Two training engines behind one interface: accelerate (DDP) and DeepSpeed (ZeRO).

An engine owns the wrapped model, the optimizer and the precision; the loop in `pipeline/loop.py` owns
everything else. Both run the same code on CPU and GPU.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from pipeline import distributed
from pipeline.errors import UserError
from pipeline.files import write_json
from pipeline.optim import build_adamw, build_muon, set_learning_rates
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

    def accumulate(self, batch: Batch, step: int, share: float, last: bool) -> Metrics:
        """Forward and backward of one of 1 / `share` micro-batches. Returns the loss and the objective's metrics."""

    def update(self, schedule: float) -> Update:
        """The optimizer's step, at `schedule` times its peak learning rate."""

    def autocast(self) -> AbstractContextManager[Any]:
        """The training precision, for evaluation."""

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
    if kind == "accelerate":
        return AccelerateEngine(objective, training)
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
        _expect_all_processes(self.accelerator.num_processes)
        self.objective = objective
        self.training = training
        self.model, self.optimizer = self.accelerator.prepare(objective, build_adamw(objective, training))

    def accumulate(self, batch: Batch, step: int, share: float, last: bool) -> Metrics:
        with nullcontext() if last else self.accelerator.no_sync(self.model):
            loss, metrics = self.model(batch, step)
            self.accelerator.backward(loss * share)
        return {"loss": loss.detach()} | metrics

    def update(self, schedule: float) -> Update:
        set_learning_rates(self.optimizer, schedule)
        limit = self.training.gradient_clipping or float("inf")
        norm = float(self.accelerator.clip_grad_norm_(self.model.parameters(), limit))
        finite = torch.isfinite(torch.tensor(norm)).item()
        if finite or self.accelerator.scaler is not None:  # the fp16 scaler must see overflows to adapt
            self.optimizer.step()
        applied = bool(finite and not self.optimizer.step_was_skipped)
        self.optimizer.zero_grad(set_to_none=True)
        return Update(norm, applied)

    def autocast(self) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = self.accelerator.autocast()
        return context

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


class DeepSpeedEngine:
    """DeepSpeed's engine: ZeRO partitions optimizer states (1), gradients (2) and parameters (3) over processes.

    Rajbhandari et al. 2020. bf16 is torch autocast over float32 weights, as in `AccelerateEngine`.
    """

    def __init__(
        self, objective: nn.Module, training: TrainingConfig, config: DeepSpeedConfig, directory: Path
    ) -> None:
        os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
        import deepspeed

        distributed.init(alone=True)
        _spare_the_shared_memory_build()
        settings = deepspeed_settings(training, config, accumulation_steps(training))
        if distributed.is_main():
            write_json(directory / "deepspeed.json", settings)
        self.objective = objective
        self.training = training
        build = build_muon if training.optimizer == "muon" else build_adamw
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=objective, optimizer=build(objective, training), config=settings
        )
        _expect_all_processes(self._engine.world_size)

    def accumulate(self, batch: Batch, step: int, share: float, last: bool) -> Metrics:
        loss, metrics = self._engine(batch, step)
        self._engine.backward(loss)  # divides by the accumulation steps itself
        if not last:
            self._engine.step()  # only counts the micro-batch
        return {"loss": loss.detach()} | metrics

    def update(self, schedule: float) -> Update:
        set_learning_rates(self._optimizer, schedule)
        self._engine.step()
        applied = not getattr(self._optimizer, "overflow", False)
        norm = self._engine.get_global_grad_norm()
        return Update(float("nan") if norm is None else float(norm), applied)

    def autocast(self) -> AbstractContextManager[Any]:
        dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
        if self.training.precision not in dtypes:
            return nullcontext()
        return torch.autocast(distributed.device().type, dtypes[self.training.precision])

    def save(self, directory: Path) -> None:
        # DeepSpeed writes its own `latest` before its last barrier, so ours alone counts.
        self._engine.save_checkpoint(str(directory), tag="deepspeed", save_latest=False)

    def load(self, directory: Path) -> None:
        path, _ = self._engine.load_checkpoint(str(directory), tag="deepspeed")
        if path is None:  # DeepSpeed only warns
            raise UserError(f"expected DeepSpeed's files in {directory}, found none that fit: see the log above")


def deepspeed_settings(training: TrainingConfig, config: DeepSpeedConfig, accumulation: int) -> dict[str, Any]:
    """DeepSpeed's config dict, built from ours."""
    micro = training.batch_size // (distributed.world_size() * accumulation)
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0 if training.optimizer == "muon" else training.gradient_clipping,
        "zero_optimization": {"stage": config.zero_stage, "overlap_comm": False},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
    }
    if training.precision == "bf16":
        settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    elif training.precision == "fp16":
        settings["fp16"] = {"enabled": True}
    return settings


def _spare_the_shared_memory_build() -> None:
    """On CPU DeepSpeed compiles a collective for a minute at first use; gloo does the same job without."""
    from deepspeed import ops

    compatible = getattr(ops, "__compatible_ops__", None)
    if isinstance(compatible, dict) and not torch.cuda.is_available():
        compatible["deepspeed_shm_comm"] = False


def _expect_all_processes(found: int) -> None:
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
