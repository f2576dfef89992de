"""DeepSpeed's engine: ZeRO partitions optimizer states (1), gradients (2) and parameters (3) over processes.

Rajbhandari et al. 2020. bf16 is torch autocast over float32 weights, as on accelerate's engine; fp16 is DeepSpeed's
own, with float32 master weights and loss scaling, on GPUs only.

Checkpoints are ours, not DeepSpeed's, whose files fit one number of processes and are pickles: each process writes its
shards by parameter name (`sharded_state.py`, `zero_partitions.py`), so a run resumes at any number of processes and at
any stage.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any  # DeepSpeed has no types

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
    shards_of_replicated,
)
from pipeline.training.engines.zero_partitions import Partition
from pipeline.training.optimizer import build_optimizer, set_learning_rates
from pipeline.training.sharded_state import ShardedState, TensorShard, write_shards

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
_LOSS_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class DeepSpeedEngine:
    """DeepSpeed's engine and optimizer at one ZeRO stage. See `pipeline.training.engines.base.Engine`."""

    def __init__(
        self, objective: Objective, training: TrainingConfig, config: DeepSpeedConfig, directory: Path
    ) -> None:
        os.environ["DS_ACCELERATOR"] = "cuda" if torch.cuda.is_available() else "cpu"
        os.environ.pop("DEEPSPEED_TIMEOUT", None)  # of a group that it makes; it gets ours
        import deepspeed

        # DeepSpeed calls collectives by names that torch has deprecated since: a line in the log for each of them.
        warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
        distributed.init(without_launcher=True)
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
        if training.compile and self.stage == 3:  # gather whole blocks: hooks on layers within break compiled code up
            deepspeed.utils.set_z3_leaf_modules(objective, list({type(block) for block in objective.blocks()}))
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=objective, optimizer=build_optimizer(objective, training), config=settings
        )
        self.model: nn.Module = self._engine if self.stage == 3 else objective
        expect_all_processes(self._engine.world_size)

    def accumulate(self, batch: Batch, step: int, loss_scale: float, last: bool) -> Metrics:
        self._engine.set_gradient_accumulation_boundary(last)
        loss, metrics = self._engine(batch, step)
        self._engine.backward(loss)  # applies the loss scale itself, as 1 / accumulation steps
        if not last:
            self._engine.step()  # only counts the micro-batch
        return {"loss": loss.detach()} | metrics

    def update(self, learning_rate_factor: float) -> Update:
        set_learning_rates(self._optimizer, learning_rate_factor)
        if self.stage == 0:
            return self._update_without_zero()
        self._engine.step()
        # ZeRO's optimizers check the global norm themselves, and leave everything as it was if it is not finite.
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

    def autocast(self) -> AbstractContextManager[object]:
        if self.training.precision == "fp32":
            return nullcontext()
        return torch.autocast(distributed.device().type, _AUTOCAST[self.training.precision])

    def local_parameters(self) -> dict[str, Tensor]:
        return {name: p.ds_tensor.data if self.stage == 3 else p.data for name, p in self._named_parameters()}

    def sync_parameters(self) -> None:
        if self.stage == 3 and self._optimizer.persistent_parameters:
            # Small parameters stay gathered between steps: gather them again from the shards.
            small = self._optimizer.persistent_parameters
            small[0].partition(small)
            small[0].all_gather(small)

    @contextmanager
    def gathered_parameters(self) -> Iterator[None]:
        if self.stage != 3:
            yield
            return
        import deepspeed

        offload = self._optimizer.parameter_offload
        with deepspeed.zero.GatheredParameters(self.objective.parameters()):
            # Its hooks would partition each parameter after its first use, and then wait for the other processes.
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
            parameters[0].all_gather(parameters)  # for good, unlike `gathered_parameters`
            self._engine.destroy()  # its hooks would partition them after their first use

    def local_shards(self, values: dict[str, Tensor]) -> list[TensorShard]:
        if self.stage != 3:
            return shards_of_replicated(values)
        shards = []
        for name, parameter in self._named_parameters():
            start, length = zero_partitions.shard_of(parameter.ds_numel, values[name].numel())
            if length:
                shards.append(TensorShard(name, start, values[name][:length]))
        return shards

    def read_shards(self, values: dict[str, Tensor], saved: ShardedState) -> None:
        for name, parameter in self._named_parameters():
            flat = values[name].view(-1)
            start, length = 0, flat.numel()
            if self.stage == 3:
                start, length = zero_partitions.shard_of(parameter.ds_numel, length)
            saved.read_into(name, start, flat[:length])

    def save(self, directory: Path) -> None:
        shards: list[TensorShard] = []
        for partition in self._partitions():
            if partition.written:
                shards += zero_partitions.local_shards(partition, self._states(partition))
        write_shards(directory, "training", shards)
        if distributed.is_main():
            write_shards(directory, "buffers", shards_of_replicated(self._persistent_buffers(), all_of_them=True))
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
        saved = ShardedState(directory, "training")
        for partition in self._partitions():
            zero_partitions.read_shards(partition, self._states(partition), saved)
        self._weights_from_partitions()
        buffers = ShardedState(directory, "buffers")
        for name, buffer in self._persistent_buffers().items():
            buffers.read_into(name, 0, buffer.view(-1))
        for name, value in state["loss_scale"].items():
            setattr(self._optimizer.loss_scaler, name, value)

    def _named_parameters(self) -> Iterable[tuple[str, Any]]:
        """The objective's parameters; under ZeRO-3 they have more attributes than torch's."""
        return self.objective.named_parameters()

    def _partitions(self) -> list[Partition]:
        return zero_partitions.partitions(self._optimizer, self.stage, self.objective)

    def _states(self, partition: Partition) -> dict[str, object]:
        """The optimizer's states of one of its tensors."""
        optimizer = self._optimizer if self.stage == 0 else self._optimizer.optimizer
        states: dict[str, object] = optimizer.state[partition.weights]
        return states

    def _weights_from_partitions(self) -> None:
        """Copy the optimizer's float32 weights to the model."""
        if self.stage in (1, 2):
            self._optimizer.update_lp_params()
        elif self.stage == 3:
            for group in range(len(self._optimizer.fp16_groups)):
                self._optimizer._reassign_or_swap_out_partitioned_parameters(group)
            self.sync_parameters()

    def _persistent_buffers(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.objective.named_buffers() if name in self._buffers}

    def _loss_scale(self) -> dict[str, float]:
        """The state of fp16's loss scaling; empty at other precisions."""
        if self.training.precision != "fp16":
            return {}
        state = vars(self._optimizer.loss_scaler)  # a dynamic scaler has all of these, a static one only the first
        return {name: state[name] for name in _LOSS_SCALER_STATE if name in state}


def deepspeed_settings(
    training: TrainingConfig, config: DeepSpeedConfig, accumulation: int, parameters: int
) -> dict[str, object]:
    """DeepSpeed's config for a training of `parameters` parameters, with `accumulation` micro-batches per step."""
    micro = training.batch_size // (distributed.world_size() * accumulation)
    stage = config.stage(distributed.world_size(), training.precision)
    clips = training.optimizer == "adamw" and stage > 0  # at stage 0 the engine clips
    zero: dict[str, object] = {
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
    settings: dict[str, object] = {
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
