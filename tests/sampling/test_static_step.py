"""The promise of pipeline/sampling/static_step.py: the reference's codes, from steps that never wait for the device."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor

from pipeline.config.generate import SamplingConfig
from pipeline.sampling import cuda_graph, decode, static_step
from pipeline.sampling.decode import StepKind, candidate_uniforms, draw_codes
from pipeline.sampling.draw_next import UNKNOWN
from pipeline.sampling.static_step import StaticStep, static_length
from pipeline.transformer.layout import Layout
from tests.sampling.full_pass import assert_logits_of_the_full_pass
from tests.sampling.graph_on_cpu import graphs_on_cpu
from tests.transformer.test_model import LAYOUTS, SHAPES, batch, built

GUIDED = SamplingConfig(guidance=2.0, guidance_schedule="linear", top_k=7, top_p=0.95, min_p=0.001, temperature=0.9)
PROMPT_OF = torch.tensor([0, 0, 1, 2, 2])


def known_codes(layout: Layout, codes: Tensor, kind: str) -> Tensor | None:
    """Of each prompt: none, the first rows, or all but a hole."""
    known = codes.clone()
    index = torch.arange(layout.image_length)
    if kind == "first":
        known[:, layout.image_length // 2 :] = UNKNOWN
    else:
        known[:, (index % 4 == 2) | (index % 4 == 3)] = UNKNOWN
    return None if kind == "none" else known


@pytest.mark.parametrize("layout", LAYOUTS, ids=["one level", "three levels"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("sampling", "known"), [(SamplingConfig(), "none"), (GUIDED, "first"), (GUIDED, "hole")], ids=str
)
def test_the_static_step_draws_the_codes_of_the_reference(
    layout: Layout, shape: dict[str, object], sampling: SamplingConfig, known: str
) -> None:
    model = built(layout, **shape)
    text, codes = batch(layout)
    text[1, layout.text_length // 2 :] = 0  # prompts of several lengths
    uniforms = torch.stack([candidate_uniforms(0, 1, j, layout.image_length) for j in range(5)])

    def drawn(step: StepKind) -> Tensor:
        with mock.patch.object(static_step, "_STRETCH", 8):  # several stretches of a short image
            given = known_codes(layout, codes, known)
            return draw_codes(model, text, PROMPT_OF, uniforms, sampling, given, step=step)

    assert torch.equal(drawn("static"), drawn("model"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("given", [0, 3])
@torch.inference_mode()
def test_logits_of_the_static_step_equal_the_full_pass_at_every_position(
    layout: Layout, shape: dict[str, object], given: int
) -> None:
    model = built(layout, **shape)
    text, codes = batch(layout)
    _, expected = model(text, codes)
    cache = model.new_cache(len(text), static_length(layout.length))
    for layer in cache:
        layer.keys.fill_(torch.nan)  # what memory may hold
        layer.values.fill_(torch.nan)
    hidden = model.read_text(text, cache)
    if given:
        hidden = model.read_codes(codes[:, :given], 0, cache)
    step = StaticStep(model, cache, given)
    assert_logits_of_the_full_pass(step, hidden, layout, codes, expected, given)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["one level", "three levels"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("sampling", [GUIDED], ids=["guided"])
def test_one_captured_step_is_replayed_for_all_codes_of_a_level_and_draws_the_same(
    layout: Layout, shape: dict[str, object], sampling: SamplingConfig
) -> None:
    model = built(layout, **shape)
    text, codes = batch(layout)
    uniforms = torch.stack([candidate_uniforms(0, 1, j, layout.image_length) for j in range(5)])
    known = known_codes(layout, codes, "hole")
    with graphs_on_cpu() as graphs:
        drawn = draw_codes(model, text, PROMPT_OF, uniforms, sampling, known, step="static")
    assert torch.equal(drawn, draw_codes(model, text, PROMPT_OF, uniforms, sampling, known, step="model"))
    several = [level for level in layout.levels if level.positions > 1]  # of one code there is nothing to replay
    assert len(graphs) == len(several)
    # A level's first code runs as it is, and so does the last code of all; the image prompt has the first two.
    assert sum(graph.replays for graph in graphs) >= sum(level.positions - 1 for level in several) - 3


def test_a_capture_that_fails_is_told_once_and_the_codes_are_the_same(caplog: pytest.LogCaptureFixture) -> None:
    def failing(*_: object, **__: object) -> object:
        raise RuntimeError("operation not permitted when stream is capturing\nand more lines")

    cuda_graph._warn.cache_clear()
    layout = LAYOUTS[1]
    model = built(layout)
    text, _ = batch(layout)
    uniforms = torch.stack([candidate_uniforms(0, 1, j, layout.image_length) for j in range(5)])
    with graphs_on_cpu(failing):
        drawn = [draw_codes(model, text, PROMPT_OF, uniforms, SamplingConfig(), step="static") for _ in range(2)]
    assert caplog.text.count("could not be captured as a CUDA graph (operation not permitted when stream") == 1
    expected = draw_codes(model, text, PROMPT_OF, uniforms, SamplingConfig(), step="model")
    assert all(torch.equal(one, expected) for one in drawn)


def test_each_device_gets_its_step() -> None:
    assert decode.choose_step("cpu") == "cached"
    assert decode.choose_step("cuda") == "static"
    assert decode.choose_step("mps") == "model"
    assert decode.choose_step("cpu", compiled=True) == "static"
    with torch.autocast("cpu"):
        assert decode.choose_step("cpu") == "cached"
        assert decode.choose_step("cpu", compiled=True) == "model"
