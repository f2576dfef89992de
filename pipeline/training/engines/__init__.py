"""Training engines with one interface (`base.py`): accelerate (DDP) and DeepSpeed (ZeRO 0 to 3)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import torch

from pipeline.config.training import DeepSpeedConfig, TrainingConfig
from pipeline.core import distributed
from pipeline.core.environment import refuse_what_decides_results
from pipeline.core.errors import UserError
from pipeline.core.objective import Objective
from pipeline.training.activation_checkpointing import checkpoint_activations
from pipeline.training.compilation import compile_blocks
from pipeline.training.engines.accelerate import AccelerateEngine
from pipeline.training.engines.base import Engine


def build_engine(
    kind: Literal["accelerate", "deepspeed"],
    objective: Objective,
    training: TrainingConfig,
    deepspeed: DeepSpeedConfig | None,
    directory: Path,
) -> Engine:
    """The engine of a training. It may change the objective's modules.

    Args:
        deepspeed: settings of that engine; by default those of an empty section.
        directory: the stage's, where the engine may note its settings.

    Raises:
        UserError: the engine has no such precision, optimizer or batch, the objective no blocks to checkpoint, or
            the environment would change results.
    """
    _check_precision(training)
    refuse_what_decides_results(os.environ)
    torch.set_float32_matmul_precision("highest")  # containers set TORCH_ALLOW_TF32_CUBLAS_OVERRIDE
    if training.compile:
        compile_blocks(objective, distributed.device())
    if training.activation_checkpointing != "none":
        checkpoint_activations(objective, training.activation_checkpointing)
    if kind == "accelerate":
        return AccelerateEngine(objective, training)
    from pipeline.training.engines.deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(objective, training, deepspeed or DeepSpeedConfig(), directory)


def _check_precision(training: TrainingConfig) -> None:
    if training.precision == "fp16" and not torch.cuda.is_available():
        raise UserError("expected training.precision bf16 or fp32 on CPU, found fp16: set training.precision=bf16")
