"""What the preflight looks at on each rank's device: memory, error counters, the speed of a matrix product."""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress

import torch

from pipeline.core import distributed, gpus

_FREE_FRACTION = 0.8  # of a GPU's memory: what is left is the driver's and this process's own
_SLOW_FRACTION = 0.5  # of the median
# Counters of the driver (`nvidia-smi --help-query-gpu`) that mean: this GPU must be reset or replaced.
_COUNTERS = (
    "ecc.errors.uncorrected.volatile.total",
    "retired_pages.pending",
    "remapped_rows.pending",
    "remapped_rows.failure",
)
_HARMLESS = ("", "0", "no", "n/a", "[n/a]", "[not supported]", "not supported")
# Xids of broken hardware: double bit error, row remapping, NVLink, off the bus, contained and uncontained ECC errors.
_HARDWARE_XIDS = (48, 64, 74, 79, 92, 95)


def device_problem() -> str | None:
    """What is wrong with this rank's GPU, or None; None where there are no GPUs."""
    if not torch.cuda.is_available():
        given = os.environ.get("SLURM_GPUS_ON_NODE", "0") != "0"
        return "expected a GPU, found none that torch can use" if given and _has_driver() else None
    mine = distributed.device().index
    try:
        free, total = torch.cuda.mem_get_info(mine)
    except RuntimeError as error:
        return f"GPU {mine} cannot be used: {str(error).splitlines()[0]}"
    if free < _FREE_FRACTION * total:
        return f"GPU {mine} has {free / 1e9:.3g} of {total / 1e9:.3g} GB free: another process holds it"
    if fault := counter_fault(_counters(f"GPU-{torch.cuda.get_device_properties(mine).uuid}")):
        return f"GPU {mine}: the driver says {fault}"
    return None


def device_identity() -> str:
    """What tells this rank's GPU from those of all others; empty where there are no GPUs."""
    if not torch.cuda.is_available():
        return ""
    return gpus.identity(os.environ, str(torch.cuda.get_device_properties(distributed.device()).uuid))


def counter_fault(counters: Mapping[str, str]) -> str | None:
    """The first of the driver's counters that means that a GPU is broken, e.g. "remapped_rows.failure=Yes"."""
    bad = [f"{name}={value}" for name, value in counters.items() if value.strip().lower() not in _HARMLESS]
    return bad[0] if bad else None


def hardware_xids(kernel_log: str) -> list[str]:
    """The lines of a kernel log in which the driver tells of broken hardware."""
    found = [(line, re.search(r"NVRM: Xid \([^)]*\): (\d+)", line)) for line in kernel_log.splitlines()]
    return [line.strip() for line, xid in found if xid and int(xid[1]) in _HARDWARE_XIDS]


def kernel_log() -> str:
    """The kernel's log where this user may read it, else empty."""
    return _output(["dmesg"]) if _has_driver() else ""


def slow_hosts(speeds: Mapping[int, float], host_of: Mapping[int, str], what: str, unit: str) -> dict[str, str]:
    """The hosts of which a rank is less than half as fast as the median of all ranks, and what to say of each.

    Args:
        speeds: of each rank, in `unit`; the higher the better.
        host_of: the host of each rank.
        what: that was measured, "a matrix product".
    """
    if len(speeds) < 2:
        return {}
    median = statistics.median(speeds.values())
    found: dict[str, str] = {}
    for rank, speed in sorted(speeds.items(), key=lambda item: item[1]):
        if speed < _SLOW_FRACTION * median:
            text = f"{what} on rank {rank} ran at {speed:.3g} {unit}, the median is {median:.3g}"
            found.setdefault(host_of[rank], text)
    return found


def matmul_tflops() -> float:
    """The speed of a short matrix product on this rank's device, in TFLOP/s; the best of three."""
    device = distributed.device()
    size, dtype, repeats = (8192, torch.bfloat16, 10) if device.type == "cuda" else (512, torch.float32, 4)
    a = torch.randn(size, size, device=device, dtype=dtype)
    best_s = float("inf")
    for _ in range(3):
        _finish(device)
        started = time.perf_counter()
        for _ in range(repeats):
            a @ a
        _finish(device)
        best_s = min(best_s, time.perf_counter() - started)
    return repeats * 2 * size**3 / best_s / 1e12


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _has_driver() -> bool:
    with suppress(OSError), open("/proc/driver/nvidia/version"):
        return True
    return False


def _counters(uuid: str) -> dict[str, str]:
    """Each counter by itself: a driver that does not know one of them answers nothing."""
    query = ["nvidia-smi", f"--id={uuid}", "--format=csv,noheader"]
    answers = {name: _output([*query, f"--query-gpu={name}"]).strip() for name in _COUNTERS}
    # What is no counter is a message.
    return {name: answer for name, answer in answers.items() if len(answer.split()) == 1}


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
