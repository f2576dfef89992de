"""The plan of a transformer's training before it starts: parameters, FLOPs, memory, time (`smalti plan`).

The objective of the config is built and run on fake tensors of the training's precision, on the GPU's path
(`live_memory.py`, `core/fake_cuda.py`), so parameters, FLOPs and activations are counted and not estimated by a formula
of one model. What DeepSpeed keeps beside them is in `gpu_plan.py`. Time comes from the peak rate of the GPU and the
utilisation that you expect of it; `mfu` in a run's metrics says what it was.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pipeline.config.training import (
    Precision,
    TrainingConfig,
    accumulation_steps,
    resolved_precision,
)
from pipeline.core.errors import UserError
from pipeline.core.image_size import images_at_once

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.config.pipeline import PipelineConfig
    from pipeline.image_tokenizer import ImageTokenizer
    from pipeline.training.live_memory import Passes
    from pipeline.transformer.layout import Layout
    from pipeline.transformer.objective import JointObjective

FLOAT32 = 4  # bytes
SAMPLE_IMAGES = 8  # of each split, that the transformer's stage generates while it trains
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
    "MI250X": Gpu(191.5, 64),  # one of its two dies, which is the GPU that a process sees
    "MI300X": Gpu(1307, 192),
}


@dataclass(frozen=True)
class Model:
    """The counts of a config's transformer."""

    layout: Layout
    on_gpu: bool
    precision: Precision  # on that device: never bf16
    parameters: int
    parameter_sizes: tuple[int, ...]  # elements of each
    muon_parameters: int  # those of them that Muon would train
    largest_parameter: int
    largest_block: int  # parameters
    outside_blocks: int  # parameters: embeddings, head, last norm
    micro_batch: int  # samples per GPU and pass
    flops: int  # of the forward pass of one micro-batch
    passes: Passes  # of one micro-batch
    cache_row: int  # bytes of one sequence's keys and values while it is generated
    image_tokenizer: int  # bytes of its weights, which are there for sample images
    decoding: int  # bytes beside them at the peak of decoding a split's sample images, as rank 0 does

    @property
    def flops_per_token(self) -> float:
        """FLOPs of a training step per token: forward, and twice as many backward."""
        return 3 * self.flops / (self.micro_batch * self.layout.length)

    @property
    def weight_bytes(self) -> int:
        """Of a weight, and of its gradient, in the model."""
        return 2 if self.precision in ("bf16-weights", "fp16") else FLOAT32


def count(config: PipelineConfig, gpus: int, device: Literal["cuda", "cpu"] = "cuda") -> Model:
    """Build the config's transformer without data, and run one micro-batch of it, as it would run on `device`.

    Raises:
        UserError: the GPUs do not divide the batch.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    from pipeline.core.arithmetic import cpu_has_bf16
    from pipeline.image_tokenizer.base import build
    from pipeline.image_tokenizer.pretrained import model_of
    from pipeline.training.flops import measure
    from pipeline.training.optimizer import muon_matrices
    from pipeline.transformer.layout import Layout

    section, text = config.transformer, config.text_tokenizer
    training = section.training
    precision = resolved_precision(training.precision, device == "cuda", "deepspeed", cpu_has_bf16())
    micro = training.batch_size // gpus // accumulation_steps(training, gpus)
    # Bytes are the same in either layout, and fake tensors cannot always be converted.
    kind = model_of(config.image_tokenizer).model_copy(update={"channels_last": False})
    with FakeTensorMode():
        image_tokenizer = build(kind, config.prepare.image_size)
        decoding = decoding_bytes(image_tokenizer)
    text_length = 1 if section.condition == "class" else text.text_length
    layout = Layout.of(text_length, text.vocab_size, image_tokenizer.levels)
    with FakeTensorMode():
        objective = _objective(config, layout)
        flops = measure(objective, _batch(layout, micro, "cpu"), precision)
    blocks = [sum(p.numel() for p in block.parameters()) for block in objective.blocks()]
    key_or_value = section.layers * section.key_value_heads * layout.length * section.head_width
    return Model(
        layout=layout,
        on_gpu=device == "cuda",
        precision=precision,
        parameters=sum(p.numel() for p in objective.parameters()),
        parameter_sizes=tuple(p.numel() for p in objective.parameters()),
        muon_parameters=sum(p.numel() for p in muon_matrices(objective)),
        largest_parameter=max(p.numel() for p in objective.parameters()),
        largest_block=max(blocks),
        outside_blocks=sum(p.numel() for p in objective.parameters()) - sum(blocks),
        micro_batch=micro,
        flops=flops,
        passes=passes_of(config, layout, precision, micro, device),
        cache_row=2 * key_or_value * (FLOAT32 if precision == "fp32" else 2),
        image_tokenizer=FLOAT32 * sum(p.numel() for p in image_tokenizer.parameters()),
        decoding=decoding,
    )


def decoding_bytes(image_tokenizer: ImageTokenizer) -> int:
    """The peak of what is beside the weights while the sample images of a split are decoded."""
    import torch

    from pipeline.training.live_memory import LiveBytes

    live, image_tokenizer = LiveBytes(), image_tokenizer.eval()
    together = min(SAMPLE_IMAGES, images_at_once(image_tokenizer.height, image_tokenizer.width))
    codes = [torch.zeros(together, level.positions, dtype=torch.long) for level in image_tokenizer.levels]
    for tensor in (*image_tokenizer.parameters(), *image_tokenizer.buffers()):
        live.know(tensor)
    with live, torch.no_grad():
        image_tokenizer.decode(codes)
    return live.peak


def passes_of(config: PipelineConfig, layout: Layout, precision: Precision, micro: int, device: str) -> Passes:
    """Memory of a step's passes with micro-batches of `micro` samples, on fake tensors of the device."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from pipeline.core.fake_cuda import fake_cuda, to_fake_cuda
    from pipeline.training.activation_checkpointing import checkpoint_activations
    from pipeline.training.live_memory import passes

    on_gpu = device == "cuda"
    dtype = {"bf16-weights": torch.bfloat16, "fp16": torch.float16}.get(precision)
    with fake_cuda() if on_gpu else FakeTensorMode(), _flex_attention_as_one_kernel() if on_gpu else nullcontext():
        objective = _objective(config, layout)
        to_fake_cuda(objective, dtype, device)
        recomputed = config.transformer.training.activation_checkpointing
        if recomputed != "none":
            checkpoint_activations(objective, recomputed)
        return passes(objective, _batch(layout, micro, device), precision)


def _objective(config: PipelineConfig, layout: Layout) -> JointObjective:
    from pipeline.transformer.build import build_transformer
    from pipeline.transformer.objective import JointObjective

    return JointObjective(build_transformer(layout, config.transformer), config.transformer)


def _batch(layout: Layout, samples: int, device: str) -> dict[str, Tensor]:
    import torch

    lengths = {"text": layout.text_length, "codes": layout.image_length}
    return {name: torch.zeros(samples, n, dtype=torch.long, device=device) for name, n in lengths.items()}


@contextmanager
def _flex_attention_as_one_kernel() -> Iterator[None]:
    """Compiled FlexAttention keeps what FlashAttention keeps: inputs, output and a number per query."""
    from unittest.mock import patch

    import torch.nn.functional as F

    def attention(query: Tensor, key: Tensor, value: Tensor, scale: float, enable_gqa: bool, **_: object) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=enable_gqa)

    with (
        patch("pipeline.transformer.attention._compiled_flex", lambda: attention),
        patch("pipeline.transformer.tables.Tables.block_mask", lambda *_: None),
    ):
        yield


def optimizer_elements(model: Model, training: TrainingConfig) -> int:
    """Elements of the optimizer's states: AdamW keeps two moments of a parameter, Muon one."""
    return 2 * model.parameters - (model.muon_parameters if training.optimizer == "muon" else 0)


def checkpoint_bytes(model: Model, training: TrainingConfig) -> int:
    """Size of a checkpoint: float32 weights, optimizer states, average."""
    average = model.parameters if training.ema_decay else 0
    return FLOAT32 * (model.parameters + optimizer_elements(model, training) + average)


def fitting_images(model: Model, limit: float) -> int:
    """How many images one GPU of `limit` bytes generates at once, in bf16 and with guidance, beside the weights."""
    left = limit - 2 * model.parameters - model.image_tokenizer
    return max(0, int(left // (2 * model.cache_row)))


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
