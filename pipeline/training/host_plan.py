"""The host's memory that the processes of a training take on a node, beside Python, torch and CUDA (`smalti plan`).

On GPUs a model, its states and its gradients are not there, unless the optimizer is offloaded. What comes and goes is
the model at the start, of which stage 3 has one parameter at a time, and the copies that checkpoints are written from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipeline.config.training import DeepSpeedConfig, TrainingConfig
from pipeline.training.resource_plan import FLOAT32, Model, checkpoint_bytes, optimizer_elements


@dataclass(frozen=True)
class HostMemory:
    """Bytes on one node, at the peaks of what a training does there."""

    start: float
    step: float  # what is offloaded
    checkpoint: float  # and the copies that are being written
    end: float  # and the parameter that rank 0 writes into the model's folder

    @property
    def peaks(self) -> dict[str, float]:
        """By what the training does then."""
        return vars(self)


def host_memory(
    model: Model, training: TrainingConfig, deepspeed: DeepSpeedConfig, stage: int, gpus: int, per_node: int
) -> HostMemory:
    """Of a node with `per_node` of the `gpus` processes, at ZeRO `stage`."""
    largest = FLOAT32 * model.largest_parameter
    built = largest if stage == 3 else FLOAT32 * model.parameters
    offloaded = 0.0
    if stage and deepspeed.offload_optimizer:  # float32 weights, their gradients, the optimizer's states, the average
        average = model.parameters if training.ema_decay else 0
        offloaded = FLOAT32 * (2 * model.parameters + optimizer_elements(model, training) + average) / gpus
    copy = checkpoint_bytes(model, training) / gpus if training.async_checkpoints else largest / gpus
    if training.async_checkpoints and model.on_gpu:
        copy *= _pinned_share(model, gpus if stage == 3 else 1)
    return HostMemory(
        start=per_node * (built + offloaded),
        step=per_node * offloaded,
        checkpoint=per_node * (offloaded + copy),
        end=per_node * (offloaded + (copy if training.async_checkpoints else 0)) + largest,
    )


def _pinned_share(model: Model, slices: int) -> float:
    """Bytes that torch takes for the pinned copy of a checkpoint, by those that are in it: a power of two per tensor.

    Args:
        slices: of each parameter. At stages 1 and 2 a process has whole parameters, but for the first and the last one.
    """
    exact = [FLOAT32 * size / slices for size in model.parameter_sizes]
    return sum(2.0 ** math.ceil(math.log2(size)) for size in exact) / sum(exact)
