"""FLOPs of a training step, counted on fake tensors, which have shapes and no data.

`smalti plan` and the training loop's MFU use it; the count follows the code, whatever the model.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from contextlib import nullcontext
from functools import cache

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config.training import Precision
from pipeline.core.objective import Objective

log = logging.getLogger(__name__)

_DTYPES = {
    "bf16": torch.bfloat16,
    "bf16-autocast": torch.bfloat16,
    "bf16-weights": torch.bfloat16,
    "fp16": torch.float16,
}


def flops_of(objective: Objective, batch: dict[str, Tensor], precision: Precision) -> int | None:
    """`measure` of an objective with real parameters; None, with a line in the log, if it cannot run without data."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    inputs: dict[str, Tensor] = {name: fake.from_tensor(tensor) for name, tensor in batch.items()}
    # A copy of all but the weights, because a forward pass in training may change running statistics.
    known: dict[int, Tensor] = {}
    for tensor in (*objective.parameters(), *objective.buffers()):
        known[id(tensor)] = fake.from_tensor(tensor)
    try:
        shell = copy.deepcopy(objective, known)
        with fake:
            return measure(shell, inputs, precision)
    except Exception as error:  # a metric less is no reason to end a training
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        log.info("no FLOPs utilisation for %s, which does not run without data (%s)", type(objective).__name__, reason)
        return None


def measure(objective: Objective, batch: dict[str, Tensor], precision: Precision) -> int:
    """FLOPs of a forward pass's matrix products and convolutions, attention in full; a step has three times as many.

    On the CPU's code path. `batch` and the objective's parameters may be real or fake.
    """
    autocast = torch.autocast("cpu", _DTYPES[precision]) if precision in _DTYPES else nullcontext()
    counter = FlopCounterMode(display=False)
    with autocast, counter, sdpa_kernel(SDPBackend.MATH):  # the counter does not know the CPU's fused kernel
        objective(batch, 0)
    flops: int = counter.get_total_flops()
    return flops


@cache
def matmul_flops_per_s(precision: Precision, device: torch.device, seconds: float = 0.2) -> float:
    """The rate of one device on a square matrix product in the training's precision, the best within `seconds`.

    Measured once a process.
    """
    size = 4096 if device.type == "cuda" else 768
    left = torch.linspace(-1, 1, size * size, device=device).view(size, size).to(_DTYPES.get(precision, torch.float32))
    product = left @ left  # the first one sets things up
    best, deadline = float("inf"), time.monotonic() + seconds
    while math.isinf(best) or time.monotonic() < deadline:  # once at least: a busy machine may sleep through `seconds`
        _wait_for(device)
        started = time.perf_counter()
        torch.matmul(left, left, out=product)
        _wait_for(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
