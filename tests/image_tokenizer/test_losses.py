"""Promises of the likelihoods, the KL terms and the Gumbel relaxation."""

from __future__ import annotations

import math

import pytest
import torch

from pipeline.image_tokenizer.losses import logit_laplace_nll, map_pixels, unmap_pixels
from pipeline.image_tokenizer.quantizers.gumbel import (
    gumbel_softmax,
    kl_of_mean_to_uniform,
    kl_to_uniform,
    to_gumbel,
)


@pytest.mark.parametrize(("mu", "b"), [(0.0, 0.5), (1.5, 0.2), (-2.0, 0.8)])
def test_logit_laplace_density_integrates_to_one_over_the_unit_interval(mu: float, b: float) -> None:
    # In t = logit(x), dx = x (1 − x) dt: the tails near 0 and 1 become wide enough for a plain sum.
    t = torch.linspace(-30, 30, 600_001, dtype=torch.float64)
    x = torch.sigmoid(t)
    inside = (x > 0) & (x < 1)
    x, t = x[inside], t[inside]
    density = torch.exp(-logit_laplace_nll(x, torch.full_like(x, mu), torch.full_like(x, math.log(b))))
    assert torch.trapezoid(density * x * (1 - x), t).item() == pytest.approx(1.0, abs=1e-4)


def test_logit_laplace_is_largest_where_the_decoder_points() -> None:
    x = torch.tensor([0.3])
    at = logit_laplace_nll(x, torch.logit(x), torch.tensor([-1.0]))
    beside = logit_laplace_nll(x, torch.logit(x) + 0.1, torch.tensor([-1.0]))
    assert at < beside


def test_shrunk_pixels_come_back_and_stay_off_the_ends() -> None:
    x = torch.linspace(0, 1, 256)
    assert map_pixels(x).min() > 0.0999
    assert map_pixels(x).max() < 0.9001
    torch.testing.assert_close(unmap_pixels(map_pixels(x)), x)


def test_kl_is_log_k_minus_entropy_and_zero_for_uniform() -> None:
    torch.manual_seed(0)
    logits = 3 * torch.randn(5, 7, 64)
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(kl_to_uniform(logits, logits.softmax(-1)), math.log(64) - entropy)
    even = torch.full((3, 64), 2.5)
    torch.testing.assert_close(kl_to_uniform(even, even.softmax(-1)), torch.zeros(3), atol=1e-5, rtol=0)


def test_kl_of_the_mean_is_zero_for_even_use_and_log_k_for_collapse() -> None:
    sure = 100 * torch.eye(16)
    assert kl_of_mean_to_uniform(sure.softmax(-1), lambda mean: mean).item() == pytest.approx(0, abs=1e-5)
    collapsed = sure[:1].expand(8, 16).softmax(-1)
    assert kl_of_mean_to_uniform(collapsed, lambda mean: mean).item() == pytest.approx(math.log(16), abs=1e-5)


def test_gumbel_relaxation_approaches_one_hot_as_temperature_falls() -> None:
    logits = torch.randn(1000, 32, generator=torch.Generator().manual_seed(0))
    peaks = []
    for tau in (2.0, 1.0, 0.25, 1 / 16, 1e-3):
        torch.manual_seed(1)
        sample = gumbel_softmax(logits, to_gumbel(torch.rand_like(logits)), tau, hard=False)
        torch.testing.assert_close(sample.sum(-1), torch.ones(1000))
        peaks.append(sample.max(-1).values.mean().item())
    assert peaks == sorted(peaks)
    assert peaks[-1] > 0.999


def test_gumbel_samples_follow_the_categorical() -> None:
    p = torch.tensor([0.5, 0.25, 0.2, 0.05])
    torch.manual_seed(0)
    drawn = gumbel_softmax(p.log().expand(200_000, 4), to_gumbel(torch.rand(200_000, 4)), 0.1, hard=True)
    torch.testing.assert_close(drawn.mean(0), p, atol=5e-3, rtol=0)


def test_gumbel_noise_has_mean_and_variance_of_the_standard_one() -> None:
    torch.manual_seed(0)
    noise = to_gumbel(torch.rand(1_000_000))
    assert noise.mean().item() == pytest.approx(0.5772, abs=5e-3)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=2e-2)


def test_straight_through_is_one_hot_with_the_gradient_of_the_relaxed_sample() -> None:
    logits = torch.randn(6, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    readout = torch.randn(8, generator=torch.Generator().manual_seed(1))
    gradients = []
    for hard in (True, False):
        torch.manual_seed(2)
        sample = gumbel_softmax(logits, to_gumbel(torch.rand_like(logits)), 0.7, hard=hard)
        if hard:
            torch.testing.assert_close(sample.max(-1).values, torch.ones(6))
        gradients.append(torch.autograd.grad((sample @ readout).sum(), logits)[0])
    torch.testing.assert_close(*gradients)
