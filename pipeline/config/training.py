"""Settings that all stages that train share: steps, batch, optimizer, schedule, precision, intervals.

Knows no torch, so that the command line and the Slurm layer can read configs in milliseconds.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.config.base import Config, added, operational
from pipeline.core.errors import UserError

Decay = Annotated[float, Field(ge=0, lt=1)]
_SECONDS = {"s": 1, "min": 60, "h": 3600}
_TIME = re.compile(r"(\d+(?:\.\d+)?)\s*(s|min|h)")
Precision = Literal["fp32", "bf16", "bf16-autocast", "bf16-weights", "fp16"]


def resolved_precision(configured: Precision, on_gpu: bool, engine: str, cpu_has_bf16: bool = True) -> Precision:
    """What `precision` means on a device: bf16 is the best form of it that device and engine have.

    On GPUs DeepSpeed's engine keeps weights and gradients in bf16 and float32 master weights in its optimizer. On CPUs,
    and on accelerate's engine, whose models are small and have codebooks, bf16 is autocast over float32 weights. CPUs
    without products in bf16 would take many times as long for it as for fp32, which it is there.
    """
    if configured != "bf16":
        return configured
    if not on_gpu and not cpu_has_bf16:
        return "fp32"
    return "bf16-weights" if on_gpu and engine == "deepspeed" else "bf16-autocast"


class ProfileConfig(Config):
    """Steps of a training that torch.profiler records, on each process, into profile/rank-N.json.gz."""

    start: int = Field(ge=0, description="steps done before")
    steps: int = Field(3, ge=1, le=100, description="how many")


class KeepBestConfig(Config):
    """Which checkpoint becomes the model: that of the best evaluation, instead of the last one."""

    metric: str = Field(
        min_length=1, description="of the evaluations, as metrics.jsonl names it: val/loss/image, val/psnr"
    )
    mode: Literal["min", "max"] = Field(description="min: smaller is better; max: larger is")
    patience: int | None = Field(
        None, ge=1, description="evaluations in a row without a new best one that end the training; null: none do"
    )


class TrainingConfig(Config):
    """Section `training` of a stage that trains: steps, batch, optimizer and intervals.

    A step is one optimizer update on one global batch.
    """

    steps: int = Field(gt=0, description="optimizer updates")
    batch_size: int = Field(gt=0, le=1_000_000_000, description="samples per step, over all processes")
    micro_batch_size: int | None = operational(
        None, ge=1, description="samples per process and pass; smaller ones accumulate gradients. None: no accumulation"
    )
    precision: Precision = Field(
        "bf16",
        description="bf16: on GPUs bf16-weights (transformer) or bf16-autocast (the others), on CPUs bf16-autocast,"
        " or fp32 where they have no products in bf16 (x86 before AVX-512)."
        " bf16-weights: weights and gradients in bf16, the optimizer's weights in float32; bf16-autocast: float32"
        " weights, cast for each product; fp16: on GPUs only",
    )
    seed: int | None = added(
        None,
        ge=0,
        description="of this training: initial weights, order of samples, dropout, all that it draws; null: the run's",
    )
    tf32: bool = added(
        False, description="on GPUs, let float32 products and convolutions round their factors to 11 bits: faster"
    )
    deterministic: bool = added(
        False, description="same bits at each run on GPUs, too: slower, and an operation that cannot is an error"
    )
    compile: bool = operational(
        False, description="run the blocks through torch.compile: faster on GPUs after a minute; sums round differently"
    )
    activation_checkpointing: Literal["none", "attention", "block"] = operational(
        "none",
        description="what the backward pass computes again instead of keeping: block: least memory, a third more work;"
        " attention (of the transformer): between the two. true: block",
    )

    optimizer: Literal["adamw", "muon"] = Field(
        "adamw", description="muon: on matrices and convolutions' kernels in blocks, AdamW on the rest"
    )
    learning_rate: float = Field(3e-4, gt=0, description="of AdamW, at its peak")
    muon_learning_rate: float = Field(0.02, gt=0, description="of Muon, at its peak")
    schedule: Literal["cosine", "wsd", "constant"] = Field(
        "cosine", description="learning rate after the warm-up; wsd: constant, then a linear decay at the end"
    )
    warmup_steps: int = Field(100, ge=0, description="steps in which the learning rate rises from 0")
    decay_fraction: float = Field(0.2, gt=0, le=1, description="wsd only: the last part of the steps, spent decaying")
    final_learning_rate_ratio: float = Field(0.0, ge=0, le=1, description="learning rate at the end / at the peak")
    weight_decay: float = Field(
        0.05, ge=0, description="on matrices and kernels, not on codebooks and tables of positions"
    )
    betas: tuple[Decay, Decay] = Field((0.9, 0.98), description="of AdamW: decay of both moments")
    gradient_clipping: float = Field(1.0, ge=0, description="global gradient norm, with adamw; 0: off")
    ema_decay: float | None = Field(None, gt=0, lt=1, description="exponential moving average of the weights")

    max_nonfinite_steps: int = Field(10, ge=1, description="non-finite steps in a row before the stage gives up")
    stop_check_every: int = operational(
        50,
        ge=1,
        description="most steps between looks for a stop request and for non-finite steps; fewer where they take over"
        " 2 s, and always before a line of metrics, an evaluation or a checkpoint",
    )
    peak_tflops: float | None = operational(
        None, gt=0, description="of one device, for the FLOPs utilisation; None: matrix products measured at the start"
    )
    log_every: int = operational(10, ge=1, description="steps between lines of metrics.jsonl")
    evaluate_every: int = operational(500, ge=1, description="steps between evaluations on the validation split")
    evaluate_batches: int | None = operational(
        None,
        ge=1,
        description="batches of it in each, of batch_size samples, the same each time; null: 0.03 × evaluate_every,"
        " which takes about 1 % of the time in between, but at least 16. The reranker takes 5,000 samples",
    )
    log_images_every: int = operational(500, ge=1, description="steps between logged images")
    checkpoint_every: int | str = operational(200, description="steps between checkpoints, or time: 90s, 10min, 2h")
    keep_checkpoints: int = operational(2, ge=1, description="newest checkpoints that stay on disk")
    keep_every: int | None = operational(
        None, ge=1, description="the first checkpoint of each this many steps stays on disk, too. None: of none"
    )
    keep_best: KeepBestConfig | None = added(
        None,
        description="keep the checkpoint of the best evaluation, whose weights become model/; null: the last one's do."
        " evaluate_every and evaluate_batches then decide the result, too",
    )
    keep_optimizer: bool = operational(
        True,
        description="false: no optimizer states after the last step; of the newest checkpoints, that alone stays",
    )
    async_checkpoints: bool = operational(
        True, description="train on while a copy of the state in the host's memory is written. false: wait for it"
    )

    @field_validator("checkpoint_every")
    @classmethod
    def _is_interval(cls, value: int | str) -> int | str:
        steps_or_seconds(value)
        return value

    def deciding(self) -> frozenset[str]:
        return frozenset({"evaluate_every", "evaluate_batches"} if self.keep_best else ())

    @property
    def evaluation_batches(self) -> int:
        """The most batches that an evaluation takes: a forward pass is a third of a step."""
        return self.evaluate_batches or max(16, round(0.03 * self.evaluate_every))

    hang_timeout_s: float | None = operational(
        600.0,
        gt=0,
        description="seconds without a step, a batch of an evaluation or another sign of life after which a process"
        " writes where its threads are into its log and ends as a crash; the start, the first step, images and"
        " checkpoints may take ten times as long. null: never",
    )
    collective_timeout_s: float = operational(
        900.0, gt=0, description="seconds that processes wait for each other in a collective of tensors"
    )
    profile: ProfileConfig | None = operational(None, description="steps to profile; null: none")

    @field_validator("activation_checkpointing", mode="before")
    @classmethod
    def _from_bool(cls, value: object) -> object:
        return {True: "block", False: "none"}[value] if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _check(self) -> TrainingConfig:
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps must be below steps ({self.steps})")
        try:
            samples_per_process(self.batch_size, 1, self.micro_batch_size)
        except UserError as error:
            raise ValueError(str(error)) from error
        return self


def steps_or_seconds(interval: int | str) -> tuple[int | None, float | None]:
    """The steps, or else the seconds, of a `checkpoint_every`.

    Raises:
        ValueError: it is neither a number of steps nor a time.
    """
    if isinstance(interval, int) and interval >= 1:
        return interval, None
    found = _TIME.fullmatch(str(interval))
    if not found or float(found[1]) == 0:
        raise ValueError(f"expected a number of steps from 1 on, or a time such as 90s, 10min or 2h, found {interval}")
    return None, float(found[1]) * _SECONDS[found[2]]


def samples_per_process(batch_size: int, processes: int, micro_batch_size: int | None = None) -> int:
    """Samples of each global batch that one process has.

    Raises:
        UserError: the processes, or their micro-batches, do not divide the batch.
    """
    if batch_size % (processes * (micro_batch_size or 1)):
        by = f"{processes} process{'es' if processes > 1 else ''}"
        by += f" × micro_batch_size {micro_batch_size}" if micro_batch_size else ""
        keys = "batch_size, micro_batch_size" if micro_batch_size else "batch_size"
        raise UserError(
            f"expected batch_size to be a multiple of {by}, found {batch_size}:"
            f" change {keys} or the number of processes"
        )
    return batch_size // processes


def accumulation_steps(training: TrainingConfig, processes: int) -> int:
    """Micro-batches per step on each process.

    Raises:
        UserError: the processes, or their micro-batches, do not divide the batch.
    """
    samples = samples_per_process(training.batch_size, processes, training.micro_batch_size)
    return samples // (training.micro_batch_size or samples)


BUCKET_ELEMENTS = 50_000_000  # gradients that DeepSpeed reduces at a time; its default takes 2 GB
LIVE_ELEMENTS = 1_000_000_000  # parameters that ZeRO-3 has gathered at a time, at most; DeepSpeed's default


class DeepSpeedConfig(Config):
    """Section `deepspeed` of the transformer: how DeepSpeed partitions the training state over processes (ZeRO)."""

    zero_stage: Literal[0, 1, 2, 3] | None = operational(
        None,
        description="what is partitioned: 1 optimizer states, 2 gradients too, 3 parameters too; 0 nothing;"
        " None: 1, and 0 on one process, where partitioning only costs time (not with bf16-weights or fp16: 1)",
    )
    offload_optimizer: bool = operational(False, description="optimizer states in the host's memory, stages 1 to 3")
    overlap_communication: bool | None = operational(
        None,
        description="reduce gradients during the backward pass, and at stage 3 gather weights ahead;"
        " None: DeepSpeed's default on GPUs (at stage 3 only), never on CPUs",
    )

    @model_validator(mode="after")
    def _check(self) -> DeepSpeedConfig:
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer needs ZeRO: set zero_stage to 1, 2 or 3")
        return self

    def check_precision(self, precision: Precision) -> None:
        """Raises UserError if nothing is partitioned and weights are of 16 bits."""
        if precision in ("bf16-weights", "fp16") and self.zero_stage == 0:
            raise UserError(
                f"expected deepspeed.zero_stage 1, 2 or 3 with training.precision {precision}, whose float32"
                f" weights are in ZeRO's optimizer, found 0: set 1, or training.precision=fp32"
            )

    def stage(self, processes: int, precision: Precision) -> int:
        """The ZeRO stage of a training. What needs ZeRO (16-bit weights, offloading) has it on one process, too."""
        if self.zero_stage is not None:
            return self.zero_stage
        return 1 if processes > 1 or precision in ("bf16-weights", "fp16") or self.offload_optimizer else 0
