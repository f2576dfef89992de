"""The command `smalti plan`: parameters, FLOPs, memory, time of a transformer's training."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import click

from pipeline.config.pipeline import load_pipeline
from pipeline.config.tune import refuse_split_groups
from pipeline.core.errors import UserError
from pipeline.slurm.cluster import seconds
from pipeline.training.gpu_plan import PEAKS, fitting_micro_batch, memory
from pipeline.training.host_plan import host_memory
from pipeline.training.resource_plan import (
    GPUS,
    Gpu,
    Model,
    checkpoint_bytes,
    count,
    duration,
    fitting_images,
)
from pipeline.training.tokenizer_plan import tokenizer_memory

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
@click.option("--gpus-per-node", default=8, show_default=True, type=click.IntRange(min=1), help="processes of a node")
@click.option(
    "--host-memory-gb", type=_Number(0.001, 1e9), help="of a node, for its processes: what takes more is named"
)
@click.option(
    "--utilisation",
    default=0.4,
    show_default=True,
    type=_Number(0.001, 1),
    help="model FLOPs per second / the GPU's peak; a run's metrics say it as mfu",
)
@click.option("--time-limit", default="24:00:00", show_default=True, help="of one Slurm job, HH:MM:SS or D-HH:MM:SS")
@click.option(
    "--image-size",
    "image_sizes",
    multiple=True,
    type=click.IntRange(min=1),
    help="the image tokenizer's memory there, too",
)
def plan(
    config_path: str,
    overrides: tuple[str, ...],
    gpu: str,
    gpus: int,
    peak_tflops: float | None,
    memory_gb: float | None,
    gpus_per_node: int,
    host_memory_gb: float | None,
    utilisation: float,
    time_limit: str,
    image_sizes: tuple[int, ...],
) -> None:
    """Show what training the transformer of CONFIG will take: parameters, FLOPs, memory, GPU-hours, Slurm jobs."""
    from pipeline.sampling.checks import check_sampling_of

    config = load_pipeline(config_path, overrides)
    limit_s = _seconds(time_limit)
    device = _gpu(gpu, peak_tflops, memory_gb)
    try:
        model = count(config, gpus)
    except (RuntimeError, OverflowError) as error:
        raise UserError(f"expected a model that can be counted, found one too large: {error}") from error
    check_sampling_of(config, model.layout)
    lines = [*_model(config, model), "", *_time(config, model, gpu, device, gpus, utilisation, time_limit, limit_s)]
    host = _host(config, model, gpus, min(gpus_per_node, gpus), host_memory_gb)
    images = [
        _order(config, model),
        _images(config, model, device),
        *_tune(config, model, gpus, utilisation * gpus * device.tflops * 1e12),
        *(_image_tokenizer(config, size, device, gpus) for size in image_sizes),
    ]
    click.echo("\n".join([*lines, "", *_memory(config, model, device, gpus), host, *images]))


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
    kept, with_others = training.keep_checkpoints, ""
    if training.keep_best:
        kept, with_others = kept + 1, " and keep_best"
    if training.keep_every:
        kept += training.steps // training.keep_every
        with_others += f" and keep_every {training.keep_every:,}"
    text = f"{layout.text_length:,} text tokens of {layout.text_vocab_size:,}"
    if section.condition == "class":
        text = f"a class, counted as one of text_tokenizer.vocab_size {layout.text_vocab_size:,} ids"
    codes = " + ".join(f"{level.height}×{level.width} of {level.codebook_size:,}" for level in layout.levels)
    return [
        f"{config.name}: {section.layers} layers, width {section.width:,}, {section.heads} heads of"
        f" {section.width // section.heads}",
        f"sequence        {text}, then {layout.image_length:,} codes ({codes}): {layout.length:,}",
        f"parameters      {_si(model.parameters)}; {_gb(2 * model.parameters)} in 16 bits",
        f"training        {training.steps:,} steps of {training.batch_size:,} samples: {_si(samples)} samples,"
        f" {_si(tokens)} tokens",
        f"FLOPs           {_si(model.flops_per_token)} per token, forward and backward;"
        f" {tokens * model.flops_per_token:.3g} in all",
        f"checkpoint      {_gb(saved)}; {_gb(kept * saved)} on disk with"
        f" keep_checkpoints {training.keep_checkpoints}{with_others}, one more while saving",
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


_COLUMNS = ("weights", "optimizer", "average", "gradients", "activations", *PEAKS)


def _memory(config: PipelineConfig, model: Model, gpu: Gpu, gpus: int) -> list[str]:
    section = config.transformer
    training, limit = section.training, gpu.memory_gb * 1e9
    section.deepspeed.check_precision(model.precision)
    chosen = section.deepspeed.stage(gpus, model.precision)
    recomputed = "" if training.activation_checkpointing == "block" else "; activations: less with"
    recomputed += " training.activation_checkpointing=block" if recomputed else ""
    lines = [
        f"memory per GPU, {model.precision}, micro-batch {model.micro_batch}{recomputed}",
        "     there all the time" + " " * 17 + "in a step" + " " * 15 + "peaks",
        "ZeRO" + "".join(f"{name:>12}" for name in _COLUMNS),
    ]
    for stage in range(4):
        if stage == 0 and model.weight_bytes == 2:
            continue  # 16-bit weights need ZeRO's optimizer
        need = memory(model, training, section.deepspeed, stage, gpus)
        over = [name for name, peak in need.peaks.items() if peak > limit]
        fits = f"  more than {gpu.memory_gb:g} GB: {', '.join(over)}" if over else ""
        shown = "".join(f"{_gb(getattr(need, name)):>12}" for name in _COLUMNS)
        lines.append(f"{'*' if stage == chosen else ' '} {stage} {shown}{fits}")
    return [*lines, "* the config's stage", *_smaller(config, model, chosen, gpus, limit)]


def _host(config: PipelineConfig, model: Model, gpus: int, per_node: int, limit_gb: float | None) -> str:
    """The host's memory on a node, and what does not fit into it."""
    section = config.transformer
    stage = section.deepspeed.stage(gpus, model.precision)
    peaks = host_memory(model, section.training, section.deepspeed, stage, gpus, per_node).peaks
    over = [name for name, peak in peaks.items() if limit_gb is not None and peak > limit_gb * 1e9]
    shown = ", ".join(f"{name} {_gb(peak)}" for name, peak in peaks.items())
    fits = f"; more than {limit_gb:g} GB: {', '.join(over)}" if over else ""
    return f"host memory     of a node with {per_node} processes: {shown}{fits}"


def _smaller(config: PipelineConfig, model: Model, stage: int, gpus: int, limit: float) -> list[str]:
    """The batch that fits, if this one does not."""
    training = config.transformer.training
    need = memory(model, training, config.transformer.deepspeed, stage, gpus)
    if need.peak <= limit:
        return []
    if max(need.start, need.resume, need.images, need.checkpoint, need.end) <= limit:
        micro = fitting_micro_batch(config, model, stage, gpus, limit)
        if micro is not None:
            return [
                f"a micro-batch of {model.micro_batch} does not fit: set transformer.training.micro_batch_size={micro}"
            ]
    return ["no micro-batch fits: more GPUs, a higher zero_stage, offload_optimizer or activation_checkpointing=block"]


def _images(config: PipelineConfig, model: Model, gpu: Gpu) -> str:
    """Keys and values of generated images, and how many fit."""
    fitting, asked = fitting_images(model, gpu.memory_gb * 1e9), config.generate.batch_size
    line = f"generate        {_gb(2 * model.cache_row)} of keys and values per image, with guidance; {fitting:,} fit"
    if not fitting:
        return f"{line}: the weights alone fill the GPU"
    return line if asked <= fitting else f"{line}: set generate.batch_size={fitting} (it is {asked})"


def _image_tokenizer(config: PipelineConfig, size: int, gpu: Gpu, gpus: int) -> str:
    """What training it, and encoding and decoding an image, take on a GPU at a size of images."""
    found = tokenizer_memory(config.image_tokenizer, size, gpus)
    needs = {f"training {found.micro_batch} at a time": found.training, "encode": found.encode, "decode": found.decode}
    over = [name for name, need in needs.items() if need > gpu.memory_gb * 1e9]
    fits = f"; more than {gpu.memory_gb:g} GB: {', '.join(over)}" if over else ""
    return f"images          of {size:,} px: " + ", ".join(f"{name} {_gb(need)}" for name, need in needs.items()) + fits


def _tune(config: PipelineConfig, model: Model, gpus: int, flops_per_s: float) -> list[str]:
    """What the stage tune takes, where it is enabled: it draws, asks the start's model, and trains on what it drew."""
    section, training = config.tune, config.tune.training
    if not section.enabled:
        return []
    refuse_split_groups(section, gpus)
    passes = model.flops_per_token * (1 + 2 / 3)  # a forward pass is a third of a step
    flops = training.steps * training.batch_size * model.layout.length * passes
    return [
        f"tune            {training.steps:,} steps of {training.batch_size:,} images, {section.group_size} of each"
        f" prompt: {flops:.3g} FLOPs, {flops / flops_per_s / 3600:,.1f} hours at that rate (drawing is slower, and"
        f" rewards come on top); {_gb(model.weight_bytes * model.parameters)} more for the start's weights"
    ]


def _order(config: PipelineConfig, model: Model) -> str:
    """How often the transformer runs for an image, and what that takes: each position once, in whatever order."""
    order, layout = config.transformer.order, model.layout
    passes = {"raster": layout.image_length, "scale": len(layout.levels)}.get(order)
    passes = passes or config.generate.sampling.passes or layout.image_length
    flops = model.flops_per_token / 3 * layout.length
    return f"order           {order}: {passes:,} passes and {_si(flops)} FLOPs per image, twice with guidance"


def _seconds(text: str) -> float:
    """Seconds of a time limit in Slurm's form. Raises UserError when it is none."""
    try:
        found = seconds(text)
    except ValueError:
        found = math.inf
    if not 0 < found < math.inf:
        raise UserError(f"--time-limit {text}: expected HH:MM:SS or D-HH:MM:SS, e.g. 24:00:00")
    return found


def _si(value: float) -> str:
    for limit, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= limit:
            return f"{value / limit:.4g}{unit}"
    return f"{value:.4g}"


def _gb(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"
