"""DeepSpeed's engine: ZeRO partitions optimizer states (1), gradients (2) and parameters (3) over processes.

Rajbhandari et al. 2020. bf16 is torch autocast over float32 weights, as on accelerate's engine; fp16 is DeepSpeed's
own, with float32 master weights and loss scaling, on GPUs only.

Checkpoints are ours, not DeepSpeed's, whose files fit one number of processes and are pickles: each process writes what
it holds in pieces by parameter name (`sharded_state.py`, `zero_partitions.py`), so a run resumes at any number of
processes and at any stage.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config.training import (
    BUCKET_ELEMENTS,
    LIVE_ELEMENTS,
    DeepSpeedConfig,
    TrainingConfig,
    accumulation_steps,
)
from pipeline.core import distributed
from pipeline.core.atomic_io import read_json, write_json
from pipeline.core.errors import UserError
from pipeline.core.objective import Objective
from pipeline.training.engines import zero_partitions
from pipeline.training.engines.base import (
    Batch,
    Metrics,
    Update,
    expect_all_processes,
    expect_same_shapes,
    shapes_of,
    share_of_whole,
)
from pipeline.training.optimizer import build_optimizer, set_learning_rates
from pipeline.training.sharded_state import ShardedState, TensorShard, write_shards

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class DeepSpeedEngine:
    """See `pipeline.training.engines.base.Engine`."""

    def __init__(
        self, objective: Objective, training: TrainingConfig, config: DeepSpeedConfig, directory: Path
    ) -> None:
        os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
        import deepspeed

        # DeepSpeed calls collectives by names that torch has deprecated since: a line in the log for each of them.
        warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
        distributed.init(alone=True)
        _spare_the_shared_memory_build()
        _check(training, config)
        parameters = sum(parameter.numel() for parameter in objective.parameters())
        accumulation = accumulation_steps(training, distributed.world_size())
        settings = deepspeed_settings(training, config, accumulation, parameters)
        if distributed.is_main():
            write_json(directory / "deepspeed.json", settings)
        self.objective = objective
        self.training = training
        self.stage = config.stage(distributed.world_size(), training.precision)
        self._shapes = shapes_of(objective)
        self._buffers = set(objective.state_dict()) - set(self._shapes)
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=objective, optimizer=build_optimizer(objective, training), config=settings
        )
        self.model: nn.Module = self._engine if self.stage == 3 else objective
        expect_all_processes(self._engine.world_size)

    def accumulate(self, batch: Batch, step: int, share: float, last: bool) -> Metrics:
        self._engine.set_gradient_accumulation_boundary(last)
        loss, metrics = self._engine(batch, step)
        self._engine.backward(loss)  # divides by the accumulation steps itself
        if not last:
            self._engine.step()  # only counts the micro-batch
        return {"loss": loss.detach()} | metrics

    def update(self, schedule: float) -> Update:
        set_learning_rates(self._optimizer, schedule)
        if self.stage == 0:
            return self._update_without_zero()
        self._engine.step()
        # ZeRO's optimizers look at the global norm themselves, and leave everything as it was if it is not finite.
        applied = not self._optimizer.overflow
        return Update(float(self._engine.get_global_grad_norm()), applied)

    def _update_without_zero(self) -> Update:
        """Stage 0 is torch's optimizer after an all-reduce: DeepSpeed would report no norm and apply NaNs."""
        limit = self.training.gradient_clipping if self.training.optimizer == "adamw" else 0.0
        parameters = [parameter for parameter in self.objective.parameters() if parameter.grad is not None]
        norm = float(nn.utils.clip_grad_norm_(parameters, limit or float("inf")))
        applied = norm < float("inf")
        if not applied:
            self._engine.set_gradient_accumulation_boundary(False)  # then step() only counts
        self._engine.step()
        if not applied:
            self._engine.zero_grad()
        return Update(norm, applied)

    def autocast(self) -> AbstractContextManager[Any]:
        if self.training.precision == "fp32":
            return nullcontext()
        return torch.autocast(distributed.device().type, _AUTOCAST[self.training.precision])

    def held(self) -> dict[str, Tensor]:
        return {name: p.ds_tensor.data if self.stage == 3 else p.data for name, p in self._named_parameters()}

    def refresh(self) -> None:
        if self.stage == 3 and self._optimizer.persistent_parameters:
            # Small parameters stay whole between steps: gather them again from what `held` gave.
            some = self._optimizer.persistent_parameters
            some[0].partition(some)
            some[0].all_gather(some)

    @contextmanager
    def whole(self) -> Iterator[None]:
        if self.stage != 3:
            yield
            return
        import deepspeed

        offload = self._optimizer.parameter_offload
        with deepspeed.zero.GatheredParameters(self.objective.parameters()):
            # Its hooks would partition each parameter behind its first use, and then wait for the other processes.
            for hook in offload.forward_hooks + offload.backward_hooks:
                hook.remove()
            offload.forward_hooks, offload.backward_hooks = [], []
            for _, parameter in self._named_parameters():
                parameter.ds_active_sub_modules.clear()
            try:
                yield
            finally:
                offload._register_deepspeed_module(offload.module)

    def finish(self) -> None:
        if self.stage == 3:
            parameters = [parameter for _, parameter in self._named_parameters()]
            parameters[0].all_gather(parameters)  # for good, where `whole` gives them back
            self._engine.destroy()  # its hooks would partition them behind their first use

    def local_shards(self, values: dict[str, Tensor]) -> list[TensorShard]:
        if self.stage != 3:
            return share_of_whole(values)
        pieces = []
        for name, parameter in self._named_parameters():
            start, length = zero_partitions.shard_of(parameter.ds_numel, values[name].numel())
            if length:
                pieces.append(TensorShard(name, start, values[name][:length]))
        return pieces

    def fill(self, values: dict[str, Tensor], pieces: ShardedState) -> None:
        for name, parameter in self._named_parameters():
            flat = values[name].view(-1)
            start, length = 0, flat.numel()
            if self.stage == 3:
                start, length = zero_partitions.shard_of(parameter.ds_numel, length)
            pieces.fill(name, start, flat[:length])

    def save(self, directory: Path) -> None:
        pieces: list[TensorShard] = []
        for part in self._parts():
            if part.written:
                pieces += zero_partitions.local_shards(part, self._states(part))
        write_shards(directory, "training", pieces)
        if distributed.is_main():
            write_shards(directory, "buffers", share_of_whole(self._persistent_buffers(), all_of_it=True))
            state = {"shapes": self._shapes, "optimizer": self.training.optimizer, "loss_scale": self._loss_scale()}
            write_json(directory / "engine.json", state)

    def load(self, directory: Path) -> None:
        if not (directory / "engine.json").exists():
            raise UserError(
                f"expected engine.json in the checkpoint {directory}, found none: an older version wrote it."
                f" Remove the folder {directory.parent} to start over"
            )
        state = read_json(directory / "engine.json")
        expect_same_shapes(self._shapes, state["shapes"], directory)
        pieces = ShardedState(directory, "training")
        for part in self._parts():
            zero_partitions.fill(part, self._states(part), pieces)
        self._weights_from_parts()
        buffers = ShardedState(directory, "buffers")
        for name, buffer in self._persistent_buffers().items():
            buffers.fill(name, 0, buffer.view(-1))
        for name, value in state["loss_scale"].items():
            setattr(self._optimizer.loss_scaler, name, value)

    def _named_parameters(self) -> Iterable[tuple[str, Any]]:
        """Under ZeRO-3 they have more attributes than torch's."""
        return self.objective.named_parameters()

    def _parts(self) -> list[zero_partitions.Part]:
        return zero_partitions.parts(self._optimizer, self.stage, self.objective)

    def _states(self, part: zero_partitions.Part) -> dict[str, Any]:
        """The optimizer's states of one of its tensors."""
        optimizer = self._optimizer if self.stage == 0 else self._optimizer.optimizer
        states: dict[str, Any] = optimizer.state[part.weights]
        return states

    def _weights_from_parts(self) -> None:
        """The model's weights from the optimizer's float32 ones."""
        if self.stage in (1, 2):
            self._optimizer.update_lp_params()
        elif self.stage == 3:
            for group in range(len(self._optimizer.fp16_groups)):
                self._optimizer._reassign_or_swap_out_partitioned_parameters(group)
            self.refresh()

    def _persistent_buffers(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.objective.named_buffers() if name in self._buffers}

    def _loss_scale(self) -> dict[str, float]:
        """What fp16's loss scaling has learned; it may not exist."""
        scaler = getattr(self._optimizer, "loss_scaler", None) if self.training.precision == "fp16" else None
        known = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
        return {name: getattr(scaler, name) for name in known if hasattr(scaler, name)}


def deepspeed_settings(
    training: TrainingConfig, config: DeepSpeedConfig, accumulation: int, parameters: int
) -> dict[str, Any]:
    """DeepSpeed's config dict, built from ours."""
    micro = training.batch_size // (distributed.world_size() * accumulation)
    stage = config.stage(distributed.world_size(), training.precision)
    clips = training.optimizer == "adamw" and stage > 0  # at stage 0 the engine clips
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": config.overlap_communication,
        "reduce_bucket_size": min(parameters, BUCKET_ELEMENTS),
        "allgather_bucket_size": BUCKET_ELEMENTS,
        "stage3_max_live_parameters": LIVE_ELEMENTS,
    }
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if training.optimizer == "muon":
        zero["reduce_scatter"] = False  # stage 3 insists
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": training.gradient_clipping if clips else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW is as fast, and needs no compiler
        "steps_per_print": 2**31,
    }
    if training.precision == "bf16":
        settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    elif training.precision == "fp16":
        settings["fp16"] = {"enabled": True}
    return settings


def _check(training: TrainingConfig, config: DeepSpeedConfig) -> None:
    if training.precision == "fp16" and config.zero_stage == 0:
        raise UserError("expected deepspeed.zero_stage 1, 2 or 3 with training.precision fp16, found 0: set 1")


def _spare_the_shared_memory_build() -> None:
    """On CPU DeepSpeed compiles a collective for a minute at first use; gloo does the same job without."""
    from deepspeed import ops

    compatible = getattr(ops, "__compatible_ops__", None)
    if isinstance(compatible, dict) and not torch.cuda.is_available():
        compatible["deepspeed_shm_comm"] = False
