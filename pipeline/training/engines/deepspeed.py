"""DeepSpeed's engine: ZeRO partitions optimizer states (1), gradients (2) and parameters (3) over processes.

Rajbhandari et al. 2020. `bf16-weights`, what bf16 means on GPUs, and fp16 are DeepSpeed's own: 16-bit weights and
gradients, float32 master weights in its optimizer. `bf16-autocast` is torch's, over float32 weights.

Checkpoints are ours, not DeepSpeed's, whose files fit one number of processes and are pickles: each process writes its
shards by parameter name (`sharded_state.py`, `zero_partitions.py`), so a run resumes at any number of processes and at
any stage.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from types import ModuleType
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
from pipeline.core import distributed, malloc
from pipeline.core.atomic_io import read_json, write_json
from pipeline.core.errors import UserError
from pipeline.core.objective import Objective
from pipeline.training.checkpoint_files import Files
from pipeline.training.engines import zero_partitions
from pipeline.training.engines.base import (
    Batch,
    Metrics,
    Start,
    Update,
    expect_all_processes,
    expect_same_shapes,
    shapes_of,
    shards_of_replicated,
)
from pipeline.training.engines.partitioned_start import give_memory, give_shards
from pipeline.training.engines.zero_partitions import Partition, Span
from pipeline.training.optimizer import (
    build_optimizer,
    set_learning_rates,
    skip_unless,
    spare_muons_compilation,
)
from pipeline.training.sharded_state import ShardedState, TensorShard, shards_file

log = logging.getLogger(__name__)
_AUTOCAST = {"bf16-autocast": torch.bfloat16, "fp16": torch.float16}
_WEIGHTS = {"bf16-weights": torch.bfloat16, "fp16": torch.float16}
_NO_MODULE = -1  # DeepSpeed counts them from 0
_LOSS_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class DeepSpeedEngine:
    """DeepSpeed's engine and optimizer at one ZeRO stage. See `pipeline.training.engines.base.Engine`."""

    def __init__(
        self,
        objective: Objective,
        training: TrainingConfig,
        config: DeepSpeedConfig,
        directory: Path,
        start: Start | None = None,
    ) -> None:
        os.environ["DS_ACCELERATOR"] = "cuda" if torch.cuda.is_available() else "cpu"
        os.environ.pop("DEEPSPEED_TIMEOUT", None)  # of a group that it makes; it gets ours
        _spare_the_autotuner()
        import deepspeed

        # DeepSpeed calls collectives by names that torch has deprecated since: a line in the log for each of them.
        warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
        distributed.init(without_launcher=True)
        _spare_the_shared_memory_build()
        if not torch.cuda.is_available():
            spare_muons_compilation()
        config.check_precision(training.precision)
        parameters = sum(parameter.numel() for parameter in objective.parameters())
        accumulation = accumulation_steps(training, distributed.world_size())
        settings = deepspeed_settings(training, config, accumulation, parameters)
        if distributed.is_main():
            write_json(directory / "deepspeed.json", settings)
        self.objective = objective
        self.training = training
        self.stage = config.stage(distributed.world_size(), training.precision)
        self._clips = clips_itself(training, config, self.stage)
        self._shapes = shapes_of(objective)
        self._buffers = set(objective.state_dict()) - set(self._shapes)
        if training.compile and self.stage == 3:  # gather whole blocks: hooks on layers within break compiled code up
            deepspeed.utils.set_z3_leaf_modules(objective, list({type(block) for block in objective.blocks()}))
        optimizer = build_optimizer(objective, training)  # while parameters have their shapes
        if start is not None:
            with malloc.gives_back():
                self._give_memory(start, settings)
        with malloc.gives_back():  # at stage 3 DeepSpeed lays shards end to end, a copy, and frees each
            started = deepspeed.initialize(model=objective, optimizer=optimizer, config=settings)
        self._engine, self._optimizer = started[:2]
        if self._clips and self.stage:
            optimizer.register_step_pre_hook(self._before_a_group_steps)
        self.model: nn.Module = self._engine if self.stage == 3 else objective
        expect_all_processes(self._engine.world_size)

    def _give_memory(self, start: Start, settings: dict[str, object]) -> None:
        if self.stage < 3:
            give_memory(self.objective, start.initial, start.drawn)
        else:
            dtype = _WEIGHTS.get(self.training.precision, torch.float32)
            give_shards(self.objective, start.initial, start.drawn, settings, dtype)

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
        # Infinite where a gradient was not finite: then ZeRO's optimizers leave everything as it was.
        norm = torch.as_tensor(self._engine.get_global_grad_norm(), device=distributed.device())
        return Update(norm, norm.isfinite())

    def _before_a_group_steps(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        """Clip and check on the device what ZeRO would clip and check on the host; same arithmetic."""
        norm = torch.as_tensor(self._optimizer._global_grad_norm)
        skip_unless(norm.isfinite(), optimizer)
        if limit := self.training.gradient_clipping:
            excess = torch.clamp((norm + 1e-6) / limit, min=1.0)
            for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
                if parameter.grad is not None:
                    parameter.grad.mul_(1.0 / excess)

    def _update_without_zero(self) -> Update:
        """Stage 0 is torch's optimizer after an all-reduce: DeepSpeed would report no norm and apply NaNs."""
        limit = self.training.gradient_clipping if self._clips else 0.0
        parameters = [parameter for parameter in self.objective.parameters() if parameter.grad is not None]
        norm = nn.utils.clip_grad_norm_(parameters, limit or float("inf"))
        applied = norm.isfinite()
        if self._clips:
            skip_unless(applied, self._optimizer)
        elif not applied:  # Muon has no kernel that could skip
            self._engine.set_gradient_accumulation_boundary(False)  # then step() only counts
        self._engine.step()
        self._engine.zero_grad()
        return Update(norm, applied)

    def autocast(self) -> AbstractContextManager[object]:
        if self.training.precision not in _AUTOCAST:
            return nullcontext()
        return torch.autocast(distributed.device().type, _AUTOCAST[self.training.precision])

    def local_parameters(self) -> dict[str, Tensor]:
        if self.stage == 0:
            return {name: parameter.data for name, parameter in self._named_parameters()}
        return {span.name: part for span, part in self._slices}

    @cached_property
    def _slices(self) -> list[tuple[Span, Tensor]]:
        """Stages 1 to 3: what lies in this process's slice of the float32 weights, and where in the model it is."""
        return [
            (span, partition.weights.data.view(-1)[span.offset : span.offset + span.length])
            for partition in self._partitions()
            for span in partition.spans
        ]

    def sync_parameters(self) -> None:
        if self.stage in (1, 2):
            self._optimizer.update_lp_params()
        elif self.stage == 3:
            for group in range(len(self._optimizer.fp16_groups)):
                self._optimizer._reassign_or_swap_out_partitioned_parameters(group)
            if small := self._optimizer.persistent_parameters:
                # They stay gathered between steps: gather them again from the shards.
                small[0].partition(small)
                small[0].all_gather(small)

    @property
    def in_step(self) -> bool:
        return self.stage == 3

    @contextmanager
    def gathered_outside_blocks(self) -> Iterator[None]:
        if self.stage != 3:
            yield
            return
        import deepspeed

        within = {id(parameter) for block in self.objective.blocks() for parameter in block.parameters()}
        outside = [parameter for _, parameter in self._named_parameters() if id(parameter) not in within]
        with deepspeed.zero.GatheredParameters(outside):
            for parameter in outside:  # as if a module that is not done used them: hooks do not partition them then
                parameter.ds_active_sub_modules.add(_NO_MODULE)
            try:
                yield
            finally:
                for parameter in outside:
                    parameter.ds_active_sub_modules.discard(_NO_MODULE)

    def local_shards(self, values: dict[str, Tensor]) -> list[TensorShard]:
        if self.stage == 0:
            return shards_of_replicated(values)
        return [TensorShard(span.name, span.start, values[span.name]) for span, _ in self._slices]

    def read_shards(self, values: dict[str, Tensor], saved: ShardedState) -> None:
        starts = {span.name: span.start for span, _ in self._slices} if self.stage else {}
        for name, value in values.items():
            saved.read_into(name, starts.get(name, 0), value.view(-1))

    def checkpoint_files(self, with_optimizer: bool = True) -> Files:
        shards: list[TensorShard] = []
        for partition in self._partitions():
            if partition.written:
                shards += zero_partitions.local_shards(partition, self._states(partition) if with_optimizer else {})
        files: Files = dict([shards_file("training", shards)])
        if distributed.is_main():
            buffers = self._persistent_buffers()
            files |= [shards_file("buffers", shards_of_replicated(buffers, all_of_them=True))]
            files["engine.json"] = {
                "shapes": self._shapes,
                "buffers": {name: list(buffer.shape) for name, buffer in buffers.items()},
                "optimizer": self.training.optimizer,
                "loss_scale": self._loss_scale(),
            }
        return files

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
        self.sync_parameters()
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

    def _persistent_buffers(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.objective.named_buffers() if name in self._buffers}

    def _loss_scale(self) -> dict[str, float]:
        """The state of fp16's loss scaling; empty at other precisions."""
        if self.training.precision != "fp16":
            return {}
        state = vars(self._optimizer.loss_scaler)  # a dynamic scaler has all of these, a static one only the first
        return {name: state[name] for name in _LOSS_SCALER_STATE if name in state}


def clips_itself(training: TrainingConfig, config: DeepSpeedConfig, stage: int) -> bool:
    """Does the engine clip gradients and find the steps that are not finite, on the device?

    Else DeepSpeed does, and the host waits for its norm: at stage 3, with fp16's loss scale, and with offloading. With
    float32 weights at stages 1 and 2 it waits, too, and the engine only spares it a second look.
    """
    return training.optimizer == "adamw" and stage < 3 and training.precision != "fp16" and not config.offload_optimizer


def deepspeed_settings(
    training: TrainingConfig, config: DeepSpeedConfig, accumulation: int, parameters: int
) -> dict[str, object]:
    """DeepSpeed's config for a training of `parameters` parameters, with `accumulation` micro-batches per step."""
    micro = training.batch_size // (distributed.world_size() * accumulation)
    stage = config.stage(distributed.world_size(), training.precision)
    clips_here = clips_itself(training, config, stage)
    zero: dict[str, object] = {
        "stage": stage,
        "reduce_bucket_size": min(parameters, BUCKET_ELEMENTS),
        "allgather_bucket_size": BUCKET_ELEMENTS,
        "stage3_prefetch_bucket_size": BUCKET_ELEMENTS,
        "stage3_max_live_parameters": LIVE_ELEMENTS,
    }
    if config.overlap_communication is not None or not torch.cuda.is_available():
        zero["overlap_comm"] = bool(config.overlap_communication)
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if training.optimizer == "muon":
        zero["reduce_scatter"] = False  # stage 3 insists
    settings: dict[str, object] = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0 if clips_here or training.optimizer == "muon" else training.gradient_clipping,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW is as fast, and needs no compiler
        "steps_per_print": 2**31,
    }
    if training.precision == "bf16-weights":
        settings["bf16"] = {"enabled": True, "check_grad_overflow": not clips_here}
    elif training.precision == "bf16-autocast":
        settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    elif training.precision == "fp16":
        settings["fp16"] = {"enabled": True}
    return settings


def _spare_the_autotuner() -> None:
    """Which `import deepspeed` loads though nobody here calls it, and with it MLflow: a second of every start."""
    module = ModuleType("deepspeed.autotuning.autotuner")
    vars(module)["Autotuner"] = None
    sys.modules.setdefault(module.__name__, module)


def _spare_the_shared_memory_build() -> None:
    """On CPU DeepSpeed compiles a collective for a minute at first use; gloo does the same job without."""
    from deepspeed import ops

    compatible = getattr(ops, "__compatible_ops__", None)
    if isinstance(compatible, dict) and not torch.cuda.is_available():
        compatible["deepspeed_shm_comm"] = False
