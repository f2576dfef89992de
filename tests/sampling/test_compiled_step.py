"""The promise of `--compile`: the reference's codes, and one compilation for all images of a batch size."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from pipeline.config.generate import SamplingConfig
from pipeline.sampling.decode import candidate_uniforms, draw_codes
from pipeline.transformer.model import Transformer
from tests.transformer.test_model import LAYOUTS, batch, built

pytestmark = pytest.mark.slow  # the compiler takes its time
SHAPE = {"style": "modern", "kv_heads": 1, "attention": "sparse", "conv_kernel": 3, "layers": 3}
GUIDED = SamplingConfig(guidance=2.0, guidance_schedule="linear", top_k=7, top_p=0.95, temperature=0.9)


def codes_of(model: Transformer, images: int, compiled: bool) -> Tensor:
    text, _ = batch(model.layout)
    prompt_of = torch.tensor([0, 0, 1, 2, 2])[:images]
    uniforms = torch.stack([candidate_uniforms(0, 1, j, model.layout.image_length) for j in range(images)])
    step = None if compiled else "model"
    return draw_codes(model, text, prompt_of, uniforms, GUIDED, compiled=compiled, step=step)


def test_the_compiled_step_draws_the_codes_of_the_reference() -> None:
    torch._dynamo.reset()
    model = built(LAYOUTS[1], **SHAPE)
    assert torch.equal(codes_of(model, 5, compiled=True), codes_of(model, 5, compiled=False))


def test_batches_and_levels_share_a_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[GraphModule] = []

    def only_count(graph: GraphModule, _inputs: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=only_count))
    model = built(LAYOUTS[1], **SHAPE)
    for images, compilations in ((5, 1), (5, 1), (3, 2), (4, 2)):  # from the second batch size on, for any
        assert torch.equal(codes_of(model, images, compiled=True), codes_of(model, images, compiled=False))
        assert len(graphs) == compilations
