"""Promises of pipeline/sampling/logits.py, and of the guidance schedules of pipeline/config/generate.py."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from pipeline.config.generate import SamplingConfig
from pipeline.sampling.logits import draw, guide, invert_in_float32, invert_in_float64

INVERSIONS = pytest.mark.parametrize("invert", [invert_in_float64, invert_in_float32])
Invert = Callable[[Tensor, Tensor], Tensor]


@INVERSIONS
def test_draws_follow_the_distribution(invert: Invert) -> None:
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.2])
    n = 20_000
    drawn = invert(probabilities.log().expand(n, 4), torch.linspace(0, 1, n + 1)[:-1])
    torch.testing.assert_close(drawn.bincount(minlength=4) / n, probabilities, atol=1e-3, rtol=0)


def test_both_precisions_draw_the_same_but_where_a_number_falls_between_two_codes() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(64, 8192, generator=generator)
    uniforms = torch.rand(64, generator=generator, dtype=torch.float64)
    assert torch.equal(invert_in_float32(logits, uniforms), invert_in_float64(logits, uniforms))


def test_filters_keep_exactly_the_codes_they_promise() -> None:
    logits = torch.tensor([0.4, 0.05, 0.3, 0.25]).log().expand(1000, 4)
    spread = torch.linspace(0, 1, 1001)[:-1]
    kept = {
        "top_k 1": (SamplingConfig(top_k=1), {0}),
        "top_k 2": (SamplingConfig(top_k=2), {0, 2}),
        "top_p 0.5": (SamplingConfig(top_p=0.5), {0, 2}),
        "top_p tiny": (SamplingConfig(top_p=1e-9), {0}),
        "top_p 0.9": (SamplingConfig(top_p=0.9), {0, 2, 3}),
        "min_p 0.6": (SamplingConfig(min_p=0.6), {0, 2, 3}),
        "min_p 0.7": (SamplingConfig(min_p=0.7), {0, 2}),
        "min_p 1": (SamplingConfig(min_p=1), {0}),
        "min_p of the tempered": (SamplingConfig(min_p=0.5, temperature=0.1), {0}),
        "min_p and top_k": (SamplingConfig(min_p=0.1, top_k=2), {0, 2}),
        "top_k above the codebook": (SamplingConfig(top_k=99), {0, 1, 2, 3}),
    }
    for name, (sampling, expected) in kept.items():
        assert set(draw(logits, spread, sampling).tolist()) == expected, name


@INVERSIONS
def test_extreme_uniforms_never_draw_impossible_codes(invert: Invert) -> None:
    logits = torch.full((1, 5000), -math.inf)
    logits[0, 1000:3000] = torch.randn(2000, generator=torch.Generator().manual_seed(0))
    for uniform, expected in ((0.0, 1000), (math.nextafter(1.0, 0.0), 2999)):
        assert invert(logits, torch.tensor([uniform], dtype=torch.float64)).tolist() == [expected]


def test_a_sum_that_grows_at_an_impossible_code_does_not_draw_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As parallel sums do, which add up each prefix in an order of its own."""
    logits = torch.tensor([[0.0, -math.inf, 0.0, -math.inf]])
    rounded = torch.tensor([[0.5, 0.5 + 2**-20, 1.0, 1.0 + 2**-20]])
    monkeypatch.setattr(torch.Tensor, "cumsum", lambda _self, dim: rounded.clone())
    for uniform, expected in ((0.5, 2), (0.5 + 2**-22, 2), (math.nextafter(1.0, 0.0), 2)):
        assert invert_in_float32(logits, torch.tensor([uniform], dtype=torch.float64)).tolist() == [expected]


def test_guidance_goes_from_the_unprompted_logits_through_the_prompted_ones_and_beyond() -> None:
    prompted, unprompted = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0]])
    assert guide(prompted, unprompted, 1.0) is prompted
    for scale, expected in ((0.0, [0.0, 4.0]), (0.5, [0.5, 3.0]), (3.0, [3.0, -2.0])):
        assert guide(prompted, unprompted, scale).tolist() == [expected]


def test_schedules_begin_at_1_and_end_at_the_scale() -> None:
    for schedule, half in {"linear": 3.0, "cosine": 3.0, "power": 2.0}.items():
        config = SamplingConfig.model_validate({"guidance": 5, "guidance_schedule": schedule})
        assert [config.guidance_at(progress) for progress in (0, 0.5, 1)] == pytest.approx([1, half, 5])
    inside = SamplingConfig(guidance=5, guidance_interval=(0.25, 0.5))
    assert [inside.guidance_at(progress) for progress in (0, 0.25, 0.5, 0.51)] == [1, 5, 5, 1]
    with pytest.raises(ValidationError, match="two rising numbers from 0 to 1"):
        SamplingConfig(guidance_interval=(0.5, 0.5))
