"""The clock's metrics: how fast a training is, and how much memory it takes.

Model FLOPs utilisation (Chowdhery et al. 2022, appendix B) is what the model's matrix products need, three forward
passes a step whatever is recomputed, over what this device reaches: `training.peak_tflops`, or a rate of matrix
products that is measured once at the start, in 0.2 s. Their names are `CLOCK_METRICS` (pipeline/core/metric_names.py).
"""

from __future__ import annotations

import resource
import time
from contextlib import closing
from typing import TYPE_CHECKING

import torch

from pipeline.config.training import TrainingConfig
from pipeline.core import distributed
from pipeline.training.flops import flops_of, matmul_flops_per_s
from pipeline.training.precision import precision_here

if TYPE_CHECKING:
    from pipeline.training.workload import Workload


class Speedometer:
    """Measures samples, tokens and FLOPs per second between two readings.

    Build it before the engine, which changes the model; start it with the first step.
    """

    def __init__(self, training: TrainingConfig, workload: Workload, engine: str) -> None:
        self._batch_size = training.batch_size
        self._tokens_per_sample = workload.tokens_per_sample
        with closing(workload.batches(0)) as batches:
            batch = {name: tensor.cpu() for name, tensor in next(batches).items()}  # like the weights, until now
        self._precision = precision_here(training.precision, engine)
        # The first process reports for all; the others save themselves torch's compiler, which counting loads.
        flops = flops_of(workload.objective, batch, self._precision) if distributed.is_main() else None
        samples = next(iter(batch.values())).shape[0]
        self._flops_per_sample = 3 * flops / samples if flops else None
        self._peak_tflops = training.peak_tflops
        self._peak = 0.0
        self._since = (0.0, 0)  # when, step

    def start(self, step: int) -> None:
        """Begin to measure, after `step` steps. Without `training.peak_tflops` it takes 0.2 s to measure the peak."""
        if self._flops_per_sample:
            peak = self._peak_tflops
            self._peak = peak * 1e12 if peak else matmul_flops_per_s(self._precision, distributed.device())
        self._since = (time.monotonic(), step)

    def leave_out(self, seconds: float) -> None:
        """Do not count the last `seconds`, which were not spent training."""
        self._since = (self._since[0] + seconds, self._since[1])

    def read(self, step: int) -> dict[str, float]:
        """Metrics since the last reading; `step` steps are done by now."""
        (then, first), now = self._since, time.monotonic()
        self._since = (now, step)
        samples_per_s = (step - first) * self._batch_size / max(now - then, 1e-9)
        metrics = {"samples_per_s": samples_per_s, "memory_peak_bytes": _memory_peak_bytes()}
        if self._tokens_per_sample:
            metrics["tokens_per_s"] = samples_per_s * self._tokens_per_sample
        if self._flops_per_sample:
            own = samples_per_s / distributed.world_size()
            metrics["mfu"] = own * self._flops_per_sample / self._peak
        return metrics


def _memory_peak_bytes() -> int:
    """The most that this process has had since it began: on its GPU, or else in the host's memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
