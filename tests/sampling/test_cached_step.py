"""The promise of pipeline/sampling/step.py: it is the model, one position at a time."""

from __future__ import annotations

import pytest
import torch

from pipeline.sampling.cached_step import CachedDecoder
from tests.transformer.test_model import LAYOUTS, SHAPES, batch, built


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("given", [0, 3])
@torch.inference_mode()
def test_logits_of_the_step_equal_the_full_pass_at_every_position(layout, shape, given) -> None:  # type: ignore[no-untyped-def]
    model = built(layout, **shape)
    text, codes = batch(layout)
    _, expected = model(text, codes)
    cache = model.new_cache(len(text))
    hidden = model.read_text(text, cache)
    if given:
        hidden = model.read_codes(codes[:, :given], 0, cache)
    reader = CachedDecoder(model, cache)
    for index in range(given, layout.image_length):
        level = layout.level_at(index)
        logits = reader.logits(hidden, index)
        torch.testing.assert_close(logits, expected[level][:, index - layout.level_starts[level]], atol=1e-4, rtol=1e-4)
        if index + 1 < layout.image_length:
            hidden = reader.read(codes[:, index], index)
