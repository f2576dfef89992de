"""FD∞ and the intervals tell what they promise, on distributions whose answer is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline.evaluation.intervals import bootstrap_interval
from pipeline.metrics.frechet import frechet_deviation, frechet_distance, frechet_infinity


def normal(n: int, seed: int, dimensions: int = 16) -> Tensor:
    return torch.randn(n, dimensions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_infinity_takes_away_what_few_samples_add() -> None:
    real = normal(20_000, 0)
    draws = [normal(400, 1 + i) + 0.25 for i in range(12)]  # true distance: 16 · 0.25² = 1
    biased = torch.tensor([frechet_distance(real, generated) for generated in draws]).mean()
    generator = torch.Generator().manual_seed(0)
    unbiased = torch.tensor([frechet_infinity(real, generated, generator) for generated in draws]).mean()
    assert biased > 1.1
    assert abs(unbiased - 1) < abs(biased - 1) / 2


def test_bootstrap_deviation_is_that_of_new_samples() -> None:
    real = normal(2_000, 0)
    anew = torch.tensor([frechet_distance(real, normal(200, 100 + i) + 0.5) for i in range(60)])
    estimated = frechet_deviation(real, normal(200, 1) + 0.5, torch.Generator().manual_seed(0), resamples=60)
    assert 0.6 < estimated / anew.std().item() < 1.7


@pytest.mark.slow
def test_interval_of_a_mean_covers_it_as_often_as_it_says() -> None:
    covered = 0
    for seed in range(100):
        values = (torch.rand(200, generator=torch.Generator().manual_seed(seed)) < 0.3).double()
        low, high = bootstrap_interval(values, seed)
        covered += low <= 0.3 <= high
    assert 88 <= covered <= 100
