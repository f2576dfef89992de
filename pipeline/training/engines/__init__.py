"""Training engines with one interface (`base.py`): accelerate (DDP) and DeepSpeed (ZeRO 0 to 3)."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch

from pipeline.config.training import DeepSpeedConfig, Precision, TrainingConfig, samples_per_process
from pipeline.core import distributed
from pipeline.core.arithmetic import cpu_has_bf16, set_arithmetic, without_deterministic_form
from pipeline.core.environment import refuse_what_decides_results
from pipeline.core.errors import UserError
from pipeline.core.objective import Objective
from pipeline.training.activation_checkpointing import checkpoint_activations
from pipeline.training.compilation import compile_blocks
from pipeline.training.engines.accelerate import AccelerateEngine
from pipeline.training.engines.base import Engine, Start
from pipeline.training.precision import precision_here

log = logging.getLogger(__name__)
_MEANING = {
    "bf16-weights": "weights and gradients in bf16, the optimizer's weights in float32",
    "bf16-autocast": "float32 weights, products in bf16",
    "fp32": "a CPU has no products in bf16 (x86: AVX-512), and would take many times as long",
}


def build_engine(
    kind: Literal["accelerate", "deepspeed"],
    objective: Objective,
    training: TrainingConfig,
    deepspeed: DeepSpeedConfig | None,
    directory: Path,
    start: Start | None = None,
) -> Engine:
    """The engine of a training. It may change the objective's modules.

    Args:
        deepspeed: settings of that engine; by default those of an empty section.
        directory: the stage's, where the engine may note its settings.
        start: of an objective that was built without memory (`pipeline.core.initial_values`), for deepspeed alone.

    Raises:
        UserError: the device or the engine has no such precision, the engine no such optimizer or batch, the objective
            no blocks to checkpoint, or the environment would change results.
    """
    training = training.model_copy(update={"precision": _precision(kind, training)})
    refuse_what_decides_results(os.environ)
    set_arithmetic(training.tf32, training.deterministic)
    if training.compile:
        compile_blocks(objective, distributed.device())
    if training.activation_checkpointing != "none":
        checkpoint_activations(objective, training.activation_checkpointing)
    distributed.let_local_rank_be_the_device()
    engine: Engine
    if kind == "accelerate":
        engine = AccelerateEngine(objective, training)
    else:
        from pipeline.training.engines.deepspeed import DeepSpeedEngine

        engine = DeepSpeedEngine(objective, training, deepspeed or DeepSpeedConfig(), directory, start)
    distributed.set_collective_timeout(training.collective_timeout_s)
    return engine


def _precision(kind: Literal["accelerate", "deepspeed"], training: TrainingConfig) -> Precision:
    """What the training runs in, said in the log where the config leaves it to the device.

    Raises:
        UserError: the device or the engine has no such precision.
    """
    on_gpu = torch.cuda.is_available()
    precision = precision_here(training.precision, kind)
    if precision == "fp16" and not on_gpu:
        raise UserError("expected training.precision bf16 or fp32 on CPU, found fp16: set training.precision=bf16")
    if precision.startswith("bf16") and on_gpu and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(
            f"expected a GPU that computes in bfloat16 for training.precision {training.precision}, found"
            f" {torch.cuda.get_device_name()}: set training.precision=fp16 or fp32"
        )
    if precision == "bf16-weights" and kind == "accelerate":
        raise UserError(
            "expected training.precision bf16-autocast, fp32 or fp16 for a stage that trains through accelerate, found"
            " bf16-weights, which is the transformer's: set training.precision=bf16"
        )
    if training.precision == "bf16":
        log.info("precision bf16 is %s here: %s", precision, _MEANING[precision])
    elif precision.startswith("bf16") and not on_gpu and not cpu_has_bf16():
        log.warning(
            "precision %s on a CPU without products in bf16: a step takes many times as long as in float32; set"
            " training.precision=bf16, which is float32 there",
            precision,
        )
    return precision


@contextmanager
def device_errors_in_a_line(training: TrainingConfig) -> Iterator[None]:
    """Inside, what a device refuses and the config can avoid is a UserError: no memory, no deterministic form."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        samples = samples_per_process(training.batch_size, distributed.world_size(), training.micro_batch_size)
        micro = training.micro_batch_size or samples
        raise UserError(_does_not_fit(micro, ". ".join(str(error).split(". ")[:2]))) from error
    except RuntimeError as error:
        if operation := without_deterministic_form(error):
            raise UserError(
                f"expected operations with a deterministic form, as training.deterministic asks, found {operation},"
                " which has none on this device: set training.deterministic=false"
            ) from error
        raise


def _does_not_fit(micro_batch: int, what: str) -> str:
    smaller = f"set training.micro_batch_size={micro_batch // 2}, or" if micro_batch > 1 else "set"
    return (
        f"expected the training to fit into the GPU's memory with {micro_batch} samples a pass, found that it does not"
        f" ({what}): {smaller} training.activation_checkpointing=block; `smalti plan` says what fits"
    )
