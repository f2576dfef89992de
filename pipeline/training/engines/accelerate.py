"""The engine of stages whose model fits one GPU: DistributedDataParallel through accelerate."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.config.training import TrainingConfig
from pipeline.core import distributed
from pipeline.core.errors import UserError
from pipeline.core.objective import Objective
from pipeline.training.checkpoint_files import Files
from pipeline.training.engines.base import Batch, Metrics, Update, expect_all_processes, shards_of_replicated
from pipeline.training.optimizer import build_optimizer, set_learning_rates, skip_unless
from pipeline.training.sharded_state import ShardedState, TensorShard

_MIXED_PRECISION = {"fp32": "no", "bf16-autocast": "bf16", "fp16": "fp16"}


class AccelerateEngine:
    """DistributedDataParallel through accelerate, with a copy of model and optimizer on every process.

    See `pipeline.training.engines.base.Engine`.
    """

    in_step = False

    def __init__(self, objective: Objective, training: TrainingConfig) -> None:
        from accelerate import Accelerator
        from accelerate.utils import GradientAccumulationPlugin, TorchDynamoPlugin

        self.accelerator = Accelerator(
            cpu=not torch.cuda.is_available(),
            mixed_precision=_MIXED_PRECISION[training.precision],
            # Otherwise both come from the environment, where `accelerate launch` and shells leave them.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            dynamo_plugin=TorchDynamoPlugin(
                backend="NO", mode="default", fullgraph=False, dynamic=False, use_regional_compilation=False
            ),
        )
        expect_all_processes(self.accelerator.num_processes)
        self.objective = objective
        self.model: nn.Module = objective
        self.training = training
        groups = objective.parameter_groups()
        self._own = [p for group in groups if not group.adversary for p in group.parameters]
        self._adversaries = [group.parameters for group in groups if group.adversary]
        self._wrapped, self.optimizer = self.accelerator.prepare(
            objective, build_optimizer(objective, training, replicated=True)
        )

    def accumulate(self, batch: Batch, step: int, loss_scale: float, last: bool) -> Metrics:
        with nullcontext() if last else self.accelerator.no_sync(self._wrapped):
            loss, metrics = self._wrapped(batch, step)
            self.accelerator.backward(loss * loss_scale)
        return {"loss": loss.detach()} | metrics

    def update(self, learning_rate_factor: float) -> Update:
        set_learning_rates(self.optimizer, learning_rate_factor)
        limit = self.training.gradient_clipping or float("inf")
        clips = self.training.optimizer == "adamw"  # a step of Muon's has its own size, and its gradient's is of no use
        norm = self.accelerator.clip_grad_norm_(self._own, limit if clips else float("inf"))
        # An adversary is clipped apart: its gradient's length must not decide how far the model itself steps.
        apart = [nn.utils.clip_grad_norm_(adversary, limit) for adversary in self._adversaries]
        applied = torch.stack([norm, *(other.to(norm.device) for other in apart)]).isfinite().all()
        if self.accelerator.scaler is None:  # which finds out itself, because it must adapt
            skip_unless(applied, self.optimizer.optimizer)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return Update(norm, applied)

    def autocast(self) -> AbstractContextManager[object]:
        context: AbstractContextManager[object] = self.accelerator.autocast()
        return context

    def local_parameters(self) -> dict[str, Tensor]:
        parameters = {name: parameter.data for name, parameter in self.objective.named_parameters()}
        return parameters | self.objective.averaged_buffers()

    def sync_parameters(self) -> None:
        return

    def gathered_outside_blocks(self) -> AbstractContextManager[None]:
        return nullcontext()

    def local_shards(self, values: dict[str, Tensor]) -> list[TensorShard]:
        return shards_of_replicated(values)

    def read_shards(self, values: dict[str, Tensor], saved: ShardedState) -> None:
        for name, value in values.items():
            saved.read_into(name, 0, value.view(-1))

    def checkpoint_files(self, with_optimizer: bool = True) -> Files:
        if not distributed.is_main():
            return {}
        state = {"model": self.objective.state_dict()}
        if with_optimizer:
            state["optimizer"] = self.optimizer.state_dict()
        if self.accelerator.scaler is not None:
            state["scaler"] = self.accelerator.scaler.state_dict()
        return {"training.pt": state}

    def load(self, directory: Path) -> None:
        state = torch.load(directory / "training.pt", map_location=distributed.device(), weights_only=True)
        _load_weights(self.objective, state["model"], directory)
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        try:
            if "optimizer" in state:  # it is not after the last step, with keep_optimizer: false
                self.optimizer.load_state_dict(state["optimizer"])
                for group, own in zip(self.optimizer.param_groups, settings, strict=True):
                    group.update(own)  # rates are those of the config, which may have changed since
        except ValueError as error:  # other groups of parameters
            raise UserError(
                f"the checkpoint {directory} has the optimizer of another version ({error}): remove {directory.parent}"
                " to start over"
            ) from error
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])


def _load_weights(module: nn.Module, state: dict[str, Tensor], where: Path) -> None:
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        difference = str(error).splitlines()[1:] or [str(error)]
        first = difference[0].strip().partition(",")[0]  # torch lists every name
        raise UserError(
            f"the checkpoint {where} is of another model or version ({first}): remove {where.parent} to start over"
        ) from error
