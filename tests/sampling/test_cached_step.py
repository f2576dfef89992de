"""The promise of pipeline/sampling/cached_step.py and decode_step.py: both are the model, one position at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from pipeline.config.generate import SamplingConfig
from pipeline.sampling import decode
from pipeline.sampling.cached_step import CachedDecoder
from pipeline.sampling.decode_step import DecodeStep, ModelStep
from pipeline.transformer.layout import Layout
from pipeline.transformer.model import Cache, Transformer
from tests.sampling.full_pass import assert_logits_of_the_full_pass
from tests.transformer.test_model import LAYOUTS, SHAPES, batch, built

Build = Callable[[Transformer, Cache], DecodeStep]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("given", [0, 3])
@pytest.mark.parametrize("build", [CachedDecoder, ModelStep])
@torch.inference_mode()
def test_logits_of_the_step_equal_the_full_pass_at_every_position(
    layout: Layout, shape: dict[str, object], given: int, build: Build
) -> None:
    model = built(layout, **shape)
    text, codes = batch(layout)
    _, expected = model(text, codes)
    cache = model.new_cache(len(text))
    hidden = model.read_text(text, cache)
    if given:
        hidden = model.read_codes(codes[:, :given], 0, cache)
    step = build(model, cache)
    assert_logits_of_the_full_pass(step, hidden, layout, codes, expected, given)


GUIDED = SamplingConfig(guidance=2.0, guidance_schedule="linear", top_k=7, top_p=0.95, temperature=0.9)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("sampling", [SamplingConfig(), GUIDED], ids=["plain", "guided"])
def test_both_steps_draw_the_same_codes_in_float32(
    layout: Layout, shape: dict[str, object], sampling: SamplingConfig
) -> None:
    model = built(layout, **shape)
    text, _ = batch(layout)
    steps: list[decode.StepKind] = ["cached", "model"]
    prompt_of = torch.tensor([0, 0, 1, 2, 2])
    uniforms = torch.stack([decode.candidate_uniforms(0, 1, j, layout.image_length) for j in range(5)])
    drawn = [decode.draw_codes(model, text, prompt_of, uniforms, sampling, step=step) for step in steps]
    assert torch.equal(drawn[0], drawn[1])
