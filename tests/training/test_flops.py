"""The rate that a training is compared with."""

from __future__ import annotations

import torch

from pipeline.training.flops import matmul_flops_per_s


def test_a_machine_too_busy_to_measure_in_time_has_a_rate_all_the_same() -> None:
    assert matmul_flops_per_s("fp32", torch.device("cpu"), seconds=0.0) > 0
