"""The plan of a transformer's training before it starts: parameters, FLOPs, memory, time (`smalti plan`).

The objective of the config is built and run on fake tensors (`flops.py`), so parameters, FLOPs and activations are
counted and not estimated by a formula of one model. What DeepSpeed keeps beside them is known (`memory`), and compared
with measured memory in `benchmarks/plan_memory.py`. Time comes from the peak rate of the GPU and the utilisation that
you expect of it; `mfu` in a run's metrics says what it was.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.config.training import (
    BUCKET_ELEMENTS,
    LIVE_ELEMENTS,
    DeepSpeedConfig,
    TrainingConfig,
    accumulation_steps,
)
from pipeline.core.errors import UserError

if TYPE_CHECKING:
    from pipeline.config.pipeline import PipelineConfig
    from pipeline.training.flops import Cost
    from pipeline.transformer.layout import Layout

FLOAT32 = 4  # bytes; weights, gradients and optimizer states are float32 with bf16 autocast, too
# Seconds before the end of a job at which Slurm signals it: `stop_ahead_s`'s default, see pipeline/slurm/stage.sbatch.
STOP_MARGIN_S = 300
START_S = 60  # from the start of a job to its first step: imports, data, checkpoint


@dataclass(frozen=True)
class Gpu:
    """A GPU's peak rate of dense 16-bit matrix products, and its memory, as in the vendor's data sheet."""

    tflops: float
    memory_gb: float


GPUS = {
    "V100-16GB": Gpu(125, 16),
    "V100-32GB": Gpu(125, 32),
    "T4": Gpu(65, 16),
    "A10G": Gpu(70, 24),
    "A100-40GB": Gpu(312, 40),
    "A100-80GB": Gpu(312, 80),
    "L40S": Gpu(362, 48),
    "RTX4090": Gpu(165, 24),
    "H100": Gpu(989, 80),
    "H200": Gpu(989, 141),
    "B200": Gpu(2250, 180),
    "MI250X": Gpu(383, 128),
    "MI300X": Gpu(1307, 192),
}


@dataclass(frozen=True)
class Model:
    """The counts of a config's transformer."""

    layout: Layout
    parameters: int
    muon_parameters: int  # those of them that Muon would train
    micro_batch: int  # samples per GPU and pass
    cost: Cost  # of one micro-batch

    @property
    def flops_per_token(self) -> float:
        """FLOPs of a training step per token: forward, and twice as many backward."""
        return 3 * self.cost.flops / (self.micro_batch * self.layout.length)


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the peak of a training step."""

    weights: float
    gradients: float
    optimizer: float
    average: float
    buckets: float  # of gradients on their way to other processes
    activations: float
    head: float  # the part of them that is freed before buckets are in use
    last_block: float  # the block that is recomputed last, and the gradients that exist by then
    together: bool  # gradients and activations at once; else activations are freed as gradients appear

    @property
    def total(self) -> float:
        if self.together:
            passing = self.gradients + self.activations + self.buckets
        else:
            passing = max(self.gradients, self.activations - self.head, self.last_block) + self.buckets
        return self.weights + self.optimizer + self.average + max(passing, self.activations)


def count(config: PipelineConfig, gpus: int) -> Model:
    """Build the config's transformer without data, and run one micro-batch of it.

    Raises:
        UserError: the GPUs do not divide the batch.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from pipeline.image_tokenizer.base import build
    from pipeline.training.flops import measure
    from pipeline.training.optimizer import muon_matrices
    from pipeline.transformer.layout import Layout
    from pipeline.transformer.model import Transformer
    from pipeline.transformer.objective import JointObjective

    training, text = config.transformer.training, config.text_tokenizer
    micro = training.batch_size // gpus // accumulation_steps(training, gpus)
    with torch.device("meta"):
        levels = build(config.image_tokenizer.model, config.prepare.image_size).levels
    layout = Layout.of(text.text_length, text.vocab_size, levels)
    with FakeTensorMode():
        objective = JointObjective(Transformer(layout, config.transformer), config.transformer)
        batch = {
            "text": torch.zeros(micro, layout.text_length, dtype=torch.long),
            "codes": torch.zeros(micro, layout.image_length, dtype=torch.long),
        }
        cost = measure(objective, batch, training.precision)
    return Model(
        layout=layout,
        parameters=sum(p.numel() for p in objective.parameters()),
        muon_parameters=sum(p.numel() for p in muon_matrices(objective)),
        micro_batch=micro,
        cost=cost,
    )


def optimizer_elements(model: Model, training: TrainingConfig) -> int:
    """Elements of the optimizer's states: AdamW keeps two moments of a parameter, Muon one."""
    return 2 * model.parameters - (model.muon_parameters if training.optimizer == "muon" else 0)


def checkpoint_bytes(model: Model, training: TrainingConfig) -> int:
    """Size of a checkpoint: float32 weights, optimizer states, average."""
    average = model.parameters if training.ema_decay else 0
    return FLOAT32 * (model.parameters + optimizer_elements(model, training) + average)


def memory(
    model: Model, training: TrainingConfig, deepspeed: DeepSpeedConfig, stage: int, gpus: int, fused_attention: bool
) -> Memory:
    """Memory of one of `gpus` processes at ZeRO `stage`. Attention that is not fused keeps its scores."""
    number = 2 if training.precision == "fp16" else FLOAT32  # bytes of a weight and its gradient in the model
    full, shard = number * model.parameters, number * model.parameters / gpus
    master = FLOAT32 * model.parameters / gpus  # the optimizer works on a copy of its shard
    live = number * min(model.parameters, LIVE_ELEMENTS) if gpus > 1 else 0  # one process uses its shard as it is
    states = FLOAT32 * optimizer_elements(model, training) / (gpus if stage else 1)
    if stage and deepspeed.offload_optimizer:
        master = states = 0.0
    bucket: float = number * min(model.parameters, BUCKET_ELEMENTS)
    if training.precision == "bf16":  # autocast's parameters have a bucket of their own, at stage 3 in bf16
        bucket *= 1.5 if stage == 3 else 2
    average = FLOAT32 * model.parameters / (gpus if stage == 3 else 1) if training.ema_decay else 0.0
    last_block = 0.0
    if training.activation_checkpointing == "block":
        cost = model.cost
        scores = cost.scores_bytes / cost.blocks if fused_attention else 0
        last_block = (full if stage < 2 else shard) * (1 - 1 / cost.blocks)
        last_block += cost.block_bytes - scores + cost.output_bytes
    return Memory(
        weights={0: full, 1: full + master, 2: full + master, 3: shard + master + live}[stage],
        gradients={0: 2 * full, 1: full + shard, 2: shard, 3: shard}[stage],
        optimizer=states,
        average=average,
        buckets=bucket if stage else 0.0,
        activations=activations(model, training, fused_attention),
        head=model.cost.after_blocks_bytes,
        last_block=last_block,
        together=stage == 3 or model.micro_batch * gpus < training.batch_size,
    )


def activations(model: Model, training: TrainingConfig, fused_attention: bool) -> float:
    """Bytes of activations on one GPU at the start of the backward pass; with attention recomputed, as with nothing."""
    cost = model.cost
    scores = cost.scores_bytes if fused_attention else 0
    if training.activation_checkpointing != "block":
        return cost.saved_bytes - scores + cost.output_bytes
    outside = cost.saved_bytes - cost.all_blocks_bytes
    return outside + cost.between_blocks_bytes + cost.block_bytes - scores / cost.blocks + cost.output_bytes


@dataclass(frozen=True)
class Duration:
    """How long a training takes, and how many jobs."""

    tokens_per_s: float
    gpu_hours: float
    hours: float
    requeues: int


def duration(model: Model, training: TrainingConfig, gpus: int, flops_per_s: float, limit_s: float) -> Duration:
    """Duration of a training at `flops_per_s` model FLOPs on each GPU, in jobs of at most `limit_s` seconds.

    Raises:
        UserError: a job would have no time left to train.
    """
    tokens = training.steps * training.batch_size * model.layout.length
    tokens_per_s = gpus * flops_per_s / model.flops_per_token
    seconds = tokens / tokens_per_s
    useful = limit_s - STOP_MARGIN_S - START_S
    if useful <= 0:
        raise UserError(f"expected a time limit above {STOP_MARGIN_S + START_S} s, found {limit_s:.0f} s: allow more")
    return Duration(tokens_per_s, gpus * seconds / 3600, seconds / 3600, math.ceil(seconds / useful) - 1)
