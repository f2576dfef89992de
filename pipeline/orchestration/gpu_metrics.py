"""Load, memory, power and temperature of this process's GPU, by NVML, the library behind nvidia-smi."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from typing import Any  # NVML's handles have no type

from pipeline.core import gpus

log = logging.getLogger(__name__)


def gpu_metrics() -> dict[str, float]:
    """What NVML knows of the GPU that this process uses; empty where it uses none. MIG instances have no load."""
    uuid = _own_uuid()
    handle = _handle(uuid) if uuid else None
    if handle is None:
        return {}
    import pynvml

    readings: dict[str, Callable[[], float]] = {
        "system/gpu_percent": lambda: pynvml.nvmlDeviceGetUtilizationRates(handle).gpu,
        "system/gpu_memory_used_bytes": lambda: pynvml.nvmlDeviceGetMemoryInfo(handle).used,
        "system/gpu_power_watts": lambda: pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
        "system/gpu_temperature_celsius": lambda: pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
    }
    found: dict[str, float] = {}
    for name, read in readings.items():
        with suppress(pynvml.NVMLError):  # not every card, and no instance of one, has them all
            found[name] = float(read())
    return found


def _own_uuid() -> str | None:
    """As NVML names it. A stage that has not begun to use CUDA has no GPU, and starts no CUDA for this."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
    return gpus.identity(os.environ, f"GPU-{uuid}")


@lru_cache
def _handle(uuid: str) -> Any:
    import pynvml

    try:
        pynvml.nvmlInit()
        return pynvml.nvmlDeviceGetHandleByUUID(uuid)
    except pynvml.NVMLError as error:
        log.info("no load, power and temperature of the GPU %s among the metrics (NVML: %s)", uuid, error)
        return None
