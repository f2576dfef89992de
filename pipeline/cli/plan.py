"""The command `smalti plan`: parameters, FLOPs, memory, time of a transformer's training."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

import click

from pipeline.config.pipeline import load_pipeline
from pipeline.core.errors import UserError
from pipeline.training.resource_plan import GPUS, Gpu, Model, checkpoint_bytes, count, duration, memory

if TYPE_CHECKING:
    from pipeline.config.pipeline import PipelineConfig


class _Number(click.FloatRange):
    """A number within bounds; "nan", which no bound refuses, is none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if math.isnan(number):
            self.fail(f"{value!r} is not a number", param, ctx)
        return number


@click.command()
@click.argument("config_path", metavar="CONFIG")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--gpu", default="A100-80GB", show_default=True, help=f"one of {', '.join(GPUS)}")
@click.option("--gpus", default=8, show_default=True, type=click.IntRange(min=1), help="how many, over all nodes")
@click.option("--peak-tflops", type=_Number(0.001, 1e9), help="of a GPU that is not listed")
@click.option("--memory-gb", type=_Number(0.001, 1e9), help="of a GPU that is not listed")
@click.option(
    "--utilisation",
    default=0.4,
    show_default=True,
    type=_Number(0.001, 1),
    help="model FLOPs per second / the GPU's peak; a run's metrics say it as mfu",
)
@click.option("--time-limit", default="24:00:00", show_default=True, help="of one Slurm job, HH:MM:SS or D-HH:MM:SS")
def plan(
    config_path: str,
    overrides: tuple[str, ...],
    gpu: str,
    gpus: int,
    peak_tflops: float | None,
    memory_gb: float | None,
    utilisation: float,
    time_limit: str,
) -> None:
    """Show what training the transformer of CONFIG will take: parameters, FLOPs, memory, GPU-hours, Slurm jobs."""
    config = load_pipeline(config_path, overrides)
    limit_s = _seconds(time_limit)
    device = _gpu(gpu, peak_tflops, memory_gb)
    try:
        model = count(config, gpus)
    except (RuntimeError, OverflowError) as error:
        raise UserError(f"expected a model that can be counted, found one too large: {error}") from error
    lines = [*_model(config, model), "", *_time(config, model, gpu, device, gpus, utilisation, time_limit, limit_s)]
    click.echo("\n".join([*lines, "", *_memory(config, model, device, gpus)]))


def _gpu(name: str, peak_tflops: float | None, memory_gb: float | None) -> Gpu:
    if name in GPUS:
        known = GPUS[name]
        return Gpu(peak_tflops or known.tflops, memory_gb or known.memory_gb)
    if peak_tflops is None or memory_gb is None:
        raise UserError(
            f"--gpu {name}: expected one of {', '.join(GPUS)}, or --peak-tflops and --memory-gb of yours as well"
        )
    return Gpu(peak_tflops, memory_gb)


def _model(config: PipelineConfig, model: Model) -> list[str]:
    section, layout = config.transformer, model.layout
    training = section.training
    samples = training.steps * training.batch_size
    tokens = samples * layout.length
    saved = checkpoint_bytes(model, training)
    codes = " + ".join(f"{level.height}×{level.width} of {level.codebook_size:,}" for level in layout.levels)
    return [
        f"{config.name}: {section.layers} layers, width {section.width:,}, {section.heads} heads of"
        f" {section.width // section.heads}",
        f"sequence        {layout.text_length:,} text tokens of {layout.text_vocab_size:,}, then"
        f" {layout.image_length:,} codes ({codes}): {layout.length:,}",
        f"parameters      {_si(model.parameters)}; {_gb(2 * model.parameters)} in 16 bits",
        f"training        {training.steps:,} steps of {training.batch_size:,} samples: {_si(samples)} samples,"
        f" {_si(tokens)} tokens",
        f"FLOPs           {_si(model.flops_per_token)} per token, forward and backward;"
        f" {tokens * model.flops_per_token:.3g} in all",
        f"checkpoint      {_gb(saved)}; {_gb(training.keep_checkpoints * saved)} on disk with"
        f" keep_checkpoints {training.keep_checkpoints}, one more while saving",
    ]


def _time(
    config: PipelineConfig,
    model: Model,
    name: str,
    gpu: Gpu,
    gpus: int,
    utilisation: float,
    time_limit: str,
    limit_s: float,
) -> list[str]:
    found = duration(model, config.transformer.training, gpus, utilisation * gpu.tflops * 1e12, limit_s)
    return [
        f"on {gpus:,} × {name} ({gpu.tflops:,.0f} TFLOP/s each, {utilisation:.0%} of it used)",
        f"tokens/s        {_si(found.tokens_per_s)}",
        f"time            {found.hours:,.1f} hours, {found.gpu_hours:,.0f} GPU-hours",
        f"Slurm           {found.requeues:,} requeues in jobs of {time_limit}",
    ]


def _memory(config: PipelineConfig, model: Model, gpu: Gpu, gpus: int) -> list[str]:
    section = config.transformer
    kept = section.training.activation_checkpointing != "block"
    recomputed = "; less with training.activation_checkpointing=block" if kept else ""
    lines = [
        f"memory per GPU, micro-batch {model.micro_batch}{recomputed}",
        "ZeRO    weights  optimizer    average    buckets  gradients  activations      total",
    ]
    for stage in range(4):
        need = memory(model, section.training, section.deepspeed, stage, gpus, fused_attention=True)
        fits = "" if need.total <= gpu.memory_gb * 1e9 else f"  more than {gpu.memory_gb:g} GB"
        mark = "*" if stage == section.deepspeed.stage(gpus, section.training.precision) else " "
        columns = (need.weights, need.optimizer, need.average, need.buckets, need.gradients)
        shown = "".join(f"{_gb(column):>11}" for column in columns)
        lines.append(f"{mark} {stage} {shown}{_gb(need.activations):>13}{_gb(need.total):>11}{fits}")
    accumulates = model.micro_batch * gpus < section.training.batch_size
    both = "gradients and activations add up"
    if not accumulates:
        both = "activations are freed as gradients appear, except at stage 3"
    return [*lines, f"* the config's stage; {both}"]


def _seconds(text: str) -> float:
    """Seconds of a time limit in Slurm's form. Raises UserError when it is none."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)", text)
    if not match:
        raise UserError(f"--time-limit {text}: expected HH:MM:SS or D-HH:MM:SS, e.g. 24:00:00")
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def _si(value: float) -> str:
    for limit, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= limit:
            return f"{value / limit:.4g}{unit}"
    return f"{value:.4g}"


def _gb(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"
