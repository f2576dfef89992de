"""The memory that a training takes on a GPU at each ZeRO stage: what is there all the time, and the peaks of the rest.

What a model and its passes have is counted (`resource_plan.py`); what DeepSpeed keeps and makes beside that is what its
code does (0.19), held against real trainings: `python -m benchmarks.plan_memory`, `python -m benchmarks.large_models`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pipeline.config.training import (
    BUCKET_ELEMENTS,
    LIVE_ELEMENTS,
    DeepSpeedConfig,
    TrainingConfig,
    samples_per_process,
)
from pipeline.training.resource_plan import FLOAT32, SAMPLE_IMAGES, Model, optimizer_elements, passes_of

if TYPE_CHECKING:
    from pipeline.config.pipeline import PipelineConfig

PEAKS = ("start", "resume", "step", "evaluation", "images", "checkpoint", "end")


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU: what is there all the time, and the peaks of what a training does."""

    weights: float  # of the model
    optimizer: float  # float32 weights and moments
    average: float
    gradients: float
    activations: float  # kept for the backward pass
    start: float  # before the first update
    resume: float
    step: float
    evaluation: float
    images: float
    checkpoint: float
    end: float

    @property
    def peak(self) -> float:
        """The most that it ever takes."""
        return max(self.peaks.values())

    @property
    def peaks(self) -> dict[str, float]:
        """On the GPU, by what the training does then."""
        return {name: getattr(self, name) for name in PEAKS}


@dataclass(frozen=True)
class _Parts:
    """Bytes of one process, by what they are."""

    full: float  # all weights, or all gradients
    shard: float  # a process's part of them
    float32: float  # of the weights that it updates; the average has as many
    optimizer: float  # beside the model: moments, and from stage 1 on float32 weights
    average: float
    exchanged: float  # a tensor of the average while it takes the weights' place
    bucket: float  # of gradients that are reduced together

    @classmethod
    def of(cls, model: Model, training: TrainingConfig, deepspeed: DeepSpeedConfig, stage: int, gpus: int) -> _Parts:
        number, slices = model.weight_bytes, gpus if stage else 1
        float32 = FLOAT32 * model.parameters / slices
        optimizer = FLOAT32 * optimizer_elements(model, training) / slices + (float32 if stage else 0.0)
        average = float32 if training.ema_decay else 0.0
        if stage and deepspeed.offload_optimizer:
            float32 = optimizer = average = 0.0
        bucket: float = number * min(model.parameters, BUCKET_ELEMENTS)
        if model.precision == "bf16-autocast":  # its parameters have a bucket of their own, at stage 3 in bf16
            bucket *= 1.5 if stage == 3 else 2
        return cls(
            full=number * model.parameters,
            shard=number * model.parameters / gpus,
            float32=float32,
            optimizer=optimizer,
            average=average,
            exchanged=FLOAT32 * model.largest_parameter / slices if training.ema_decay else 0.0,
            bucket=bucket if stage else 0.0,
        )


def memory(model: Model, training: TrainingConfig, deepspeed: DeepSpeedConfig, stage: int, gpus: int) -> Memory:
    """Memory of one of `gpus` processes at ZeRO `stage`."""
    parts = _Parts.of(model, training, deepspeed, stage, gpus)
    if stage == 3:
        return _at_stage_3(model, parts, gpus)
    accumulates = model.micro_batch * gpus < training.batch_size
    return _up_to_stage_2(model, parts, stage, gpus, accumulates)


def _up_to_stage_2(model: Model, parts: _Parts, stage: int, gpus: int, accumulates: bool) -> Memory:
    there = parts.full + parts.optimizer + parts.average + model.image_tokenizer
    built = parts.full + (2 * parts.float32 if stage else 0.0) + model.image_tokenizer  # it tries gradients of zero
    used = {
        0: 2 * parts.full,  # reduced gradients are copies
        1: parts.full + parts.shard + _gradients_in_float32(model, gpus),
        2: parts.shard + _gradients_in_float32(model, gpus),
    }[stage]
    before = (parts.full if stage < 2 else parts.shard) if accumulates else 0.0  # from the micro-batch before
    passes = model.passes
    backward = passes.with_gradients if stage < 2 and not before else passes.without_gradients
    step = max(passes.before_gradients + before, backward + before + parts.bucket, used + parts.bucket)
    return Memory(
        weights=parts.full,
        optimizer=parts.optimizer,
        average=parts.average,
        gradients={0: parts.full, 1: parts.full + parts.shard, 2: parts.shard}[stage],
        activations=passes.kept,
        start=built,
        resume=max(built, there),
        step=there + step,
        evaluation=there + max(passes.evaluation, parts.exchanged),
        images=there + max(min(_own_images(gpus), SAMPLE_IMAGES) * _cache(model), model.decoding),
        checkpoint=there,  # it is copied as it lies there
        end=there + parts.exchanged,
    )


def _at_stage_3(model: Model, parts: _Parts, gpus: int) -> Memory:
    """Gradients' slices, which are where the optimizer is, and the bucket are made at the start, and stay."""
    number, passes = model.weight_bytes, model.passes
    slices = parts.shard if parts.float32 else 0.0
    there = parts.shard + parts.optimizer + parts.average + slices + parts.bucket + model.image_tokenizer
    live = outside = fetched = 0.0  # one process uses its shard as it is
    laid_out = number * min(model.parameters, BUCKET_ELEMENTS)  # a bucket's gradients, process by process
    if gpus > 1:
        live = number * min(model.parameters, LIVE_ELEMENTS)
        outside = number * (model.outside_blocks + model.largest_block)
        copies = 1 if model.on_gpu else 2  # gloo copies what it sends and gets
        fetched = laid_out = copies * laid_out  # and the weights that are gathered ahead
    # Each parameter is partitioned by itself; then the optimizer is tried with gradients of zero, before there is more.
    beginning = parts.shard + max(number * model.largest_parameter, 2 * parts.float32) + model.image_tokenizer
    built = there - parts.optimizer + parts.float32
    backward = live + max(passes.before_gradients + fetched, passes.without_gradients + laid_out)
    # Weights have left; of the slices of gradients it makes one flat tensor, and of that one in float32.
    updated = _gradients_in_float32(model, gpus) + slices if slices else 0.0
    return Memory(
        weights=parts.shard + live,
        optimizer=parts.optimizer,
        average=parts.average,
        gradients=slices,
        activations=passes.kept,
        start=max(beginning, built),
        resume=max(beginning, there),
        step=there + max(backward, updated),
        evaluation=there + max(live + fetched + passes.evaluation, parts.exchanged),
        images=there + min(parts.full, live + outside) + max(_own_images(gpus) * _cache(model), model.decoding),
        checkpoint=there,
        end=there + parts.exchanged,
    )


def _gradients_in_float32(model: Model, gpus: int) -> float:
    """The optimizer's form of its gradients, where those are not in float32."""
    return FLOAT32 * model.parameters / gpus if model.weight_bytes < FLOAT32 else 0.0


def _own_images(gpus: int) -> int:
    """Of the sample images of both splits; at stage 3 each process generates its part of them in one batch."""
    return math.ceil(2 * SAMPLE_IMAGES / gpus)


def _cache(model: Model) -> float:
    """Bytes of an image's keys and values, and of those of its prompt, which is read first."""
    return model.cache_row * (1 + (model.layout.text_length + 1) / model.layout.length)


def fitting_micro_batch(config: PipelineConfig, model: Model, stage: int, gpus: int, limit: float) -> int | None:
    """The largest micro-batch below the config's whose training fits into `limit` bytes; None if not even 1 does."""
    training = config.transformer.training
    for micro in _smaller_micro_batches(samples_per_process(training.batch_size, gpus), model.micro_batch):
        smaller = training.model_copy(update={"micro_batch_size": micro})
        passes = passes_of(config, model.layout, model.precision, micro, "cuda")
        found = replace(model, micro_batch=micro, passes=passes)
        if memory(found, smaller, config.transformer.deepspeed, stage, gpus).peak <= limit:
            return micro
    return None


def _smaller_micro_batches(samples: int, micro: int) -> Iterable[int]:
    return sorted((n for n in range(1, micro) if samples % n == 0), reverse=True)
