"""Promises of pipeline/sampling/decode.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline.config.generate import SamplingConfig
from pipeline.config.transformer import TransformerShape
from pipeline.sampling.decode import candidate_uniforms, draw_codes
from pipeline.sampling.draw_next import UNKNOWN, guidance_scales
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


def test_every_candidate_has_a_stream_of_its_own() -> None:
    keys = [(s, i, j) for s in range(3) for i in range(3) for j in range(3)]
    streams = {tuple(candidate_uniforms(*key, 5).tolist()) for key in keys}
    assert len(streams) == len(keys)
    assert torch.equal(candidate_uniforms(7, 1, 2, 5), candidate_uniforms(7, 1, 2, 9)[:5])
    # Written down: with other numbers every image of every seed would be another one.
    assert candidate_uniforms(7, 1, 2, 2).tolist() == [0.7207570516947144, 0.41107708172542357]


GUIDED = SamplingConfig(guidance=2.5, guidance_schedule="cosine", guidance_interval=(0.1, 0.8), min_p=0.01)


@pytest.mark.parametrize("sampling", [SamplingConfig(), GUIDED])
@pytest.mark.parametrize("given", [1, 4, 9, LAYOUT.image_length])
def test_an_image_completed_from_its_own_first_codes_is_the_same_image(given: int, sampling: SamplingConfig) -> None:
    model = built()
    pairs = [(0, 0), (1, 0), (2, 0), (1, 0)]
    whole = codes_of(model, pairs, sampling)
    known = whole[:3].clone()
    known[:, given:] = UNKNOWN
    prompt_of = torch.tensor([i for i, _ in pairs])
    assert torch.equal(draw_codes(model, TEXT, prompt_of, uniforms(pairs), sampling, known), whole)


def test_known_codes_stay_and_what_comes_before_them_does_not_know_them() -> None:
    model = built()
    free = codes_of(model, [(0, 0), (0, 1)], SamplingConfig())
    known = torch.full((1, LAYOUT.image_length), UNKNOWN)
    known[0, 10] = (free[0, 10] + 1) % 32
    filled = draw_codes(model, TEXT[:1], torch.tensor([0, 0]), uniforms([(0, 0), (0, 1)]), SamplingConfig(), known)
    assert (filled[:, 10] == known[0, 10]).all()
    assert torch.equal(filled[:, :10], free[:, :10])
    assert not torch.equal(filled[0, 11:], free[0, 11:])


def test_guidance_follows_its_schedule_within_each_level() -> None:
    sampling = SamplingConfig(guidance=5, guidance_schedule="linear")
    scales = guidance_scales(sampling, Layout.of(4, 40, [(2, 2, 8), (1, 3, 32)]))
    assert scales == pytest.approx([1, 1 + 4 / 3, 1 + 8 / 3, 5, 1, 3, 5])
    early = SamplingConfig(guidance=5, guidance_interval=(0, 0.5))
    assert guidance_scales(early, Layout.of(4, 40, [(2, 2, 8), (1, 3, 32)])) == [5, 5, 1, 1, 5, 5, 1]
    assert guidance_scales(SamplingConfig(), LAYOUT) is None


def test_outside_of_its_interval_guidance_is_off() -> None:
    model = built()
    coarse = LAYOUT.levels[0].positions
    early, off = SamplingConfig(guidance=8, guidance_interval=(0, 0.5)), SamplingConfig()
    late = SamplingConfig(guidance=8, guidance_interval=(0.5, 1))
    pairs = [(i, 0) for i in range(3)]
    free = codes_of(model, pairs, off)
    assert torch.equal(codes_of(model, pairs, late)[:, : coarse // 2], free[:, : coarse // 2])
    known = codes_of(model, pairs, early).clone()
    known[:, coarse + 8 :] = UNKNOWN
    rest = draw_codes(model, TEXT, torch.arange(3), uniforms(pairs), off, known)
    assert torch.equal(rest, codes_of(model, pairs, early))
    assert not torch.equal(rest[:, :coarse], free[:, :coarse])
