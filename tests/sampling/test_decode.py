"""Promises of pipeline/sampling/decode.py."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pipeline.sampling.config import SamplingConfig
from pipeline.sampling.decode import candidate_uniforms, draw, draw_codes
from pipeline.transformer.config import TransformerShape
from pipeline.transformer.layout import Layout
from pipeline.transformer.model import Transformer

LAYOUT = Layout.of(4, 40, [(2, 2, 8), (4, 4, 32)])


def built() -> Transformer:
    torch.manual_seed(1)
    model = Transformer(LAYOUT, TransformerShape(layers=2, width=32, heads=4)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


TEXT = torch.randint(0, 40, (3, 4), generator=torch.Generator().manual_seed(5))


def uniforms(pairs: list[tuple[int, int]], seed: int = 0) -> Tensor:
    return torch.stack([candidate_uniforms(seed, i, j, LAYOUT.image_length) for i, j in pairs])


def codes_of(model: Transformer, pairs: list[tuple[int, int]], sampling: SamplingConfig) -> Tensor:
    return draw_codes(model, TEXT, torch.tensor([i for i, _ in pairs]), uniforms(pairs), sampling)


@pytest.mark.parametrize("sampling", [SamplingConfig(), SamplingConfig(guidance=3.0, top_k=6, temperature=0.8)])
def test_the_same_codes_whatever_the_batch(sampling: SamplingConfig) -> None:
    model = built()
    pairs = [(i, j) for i in range(3) for j in range(4)]
    together = codes_of(model, pairs, sampling)
    assert len({tuple(row.tolist()) for row in together}) == len(pairs)
    for row, pair in enumerate(pairs):
        assert torch.equal(codes_of(model, [pair], sampling)[0], together[row])
    assert torch.equal(codes_of(model, pairs[::-1], sampling), together.flip(0))


def test_every_level_gets_codes_of_its_own_codebook() -> None:
    codes = codes_of(built(), [(i, j) for i in range(3) for j in range(20)], SamplingConfig(temperature=10))
    coarse, fine = codes[:, :4], codes[:, 4:]
    assert 0 <= int(coarse.min()) <= int(coarse.max()) < 8
    assert 8 <= int(fine.max()) < 32


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_drawing_at_temperature_0_follows_the_full_pass(guidance: float) -> None:
    model = built()
    codes = codes_of(model, [(0, 0), (2, 0)], SamplingConfig(temperature=0, guidance=guidance))
    with torch.no_grad():
        prompted = model(TEXT[[0, 2]], codes)[1]
        unprompted = model(torch.zeros_like(TEXT[[0, 2]]), codes)[1]
    best = [(u + guidance * (p - u)).argmax(-1) for p, u in zip(prompted, unprompted, strict=True)]
    assert torch.equal(codes, torch.cat(best, dim=1))


def test_draws_follow_the_distribution() -> None:
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.2])
    n = 20_000
    drawn = draw(probabilities.log().expand(n, 4), torch.linspace(0, 1, n + 1)[:-1], SamplingConfig())
    torch.testing.assert_close(drawn.bincount(minlength=4) / n, probabilities, atol=1e-3, rtol=0)


def test_filters_keep_exactly_the_codes_they_promise() -> None:
    logits = torch.tensor([0.4, 0.05, 0.3, 0.25]).log().expand(1000, 4)
    spread = torch.linspace(0, 1, 1001)[:-1]
    kept = {
        "top_k 1": (SamplingConfig(top_k=1), {0}),
        "top_k 2": (SamplingConfig(top_k=2), {0, 2}),
        "top_p 0.5": (SamplingConfig(top_p=0.5), {0, 2}),
        "top_p tiny": (SamplingConfig(top_p=1e-9), {0}),
        "top_p 0.9": (SamplingConfig(top_p=0.9), {0, 2, 3}),
        "top_k above the codebook": (SamplingConfig(top_k=99), {0, 1, 2, 3}),
    }
    for name, (sampling, expected) in kept.items():
        assert set(draw(logits, spread, sampling).tolist()) == expected, name


def test_extreme_uniforms_never_draw_impossible_codes() -> None:
    logits = torch.tensor([[-math.inf, 1.0, -math.inf]])
    for uniform in (0.0, math.nextafter(1.0, 0.0)):
        assert draw(logits, torch.tensor([uniform], dtype=torch.float64), SamplingConfig()).tolist() == [1]


def test_every_candidate_has_a_stream_of_its_own() -> None:
    keys = [(s, i, j) for s in range(3) for i in range(3) for j in range(3)]
    streams = {tuple(candidate_uniforms(*key, 5).tolist()) for key in keys}
    assert len(streams) == len(keys)
    assert torch.equal(candidate_uniforms(7, 1, 2, 5), candidate_uniforms(7, 1, 2, 9)[:5])
