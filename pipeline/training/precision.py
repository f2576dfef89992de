"""What a training of several processes computes in."""

from __future__ import annotations

import torch

from pipeline.config.training import Precision, resolved_precision
from pipeline.core import distributed
from pipeline.core.arithmetic import cpu_has_bf16


def cpus_have_bf16() -> bool:
    """Whether those of all processes have products in bf16; to be called on all ranks."""
    return all(distributed.all_gather_objects(cpu_has_bf16()))


def precision_here(configured: Precision, engine: str) -> Precision:
    """What `precision` means on the devices of all processes, which may have other CPUs: the same on every rank.

    To be called on all ranks.
    """
    return resolved_precision(configured, torch.cuda.is_available(), engine, cpus_have_bf16())
