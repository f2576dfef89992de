"""Promises of pipeline/sampling/order_strip.py."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.config.generate import SamplingConfig
from pipeline.config.image_tokenizer_model import VQVAEConfig
from pipeline.config.text_tokenizer import TextTokenizerConfig
from pipeline.core.level import Level
from pipeline.image_tokenizer.base import build
from pipeline.sampling.decode import candidate_uniforms, numbers_per_image
from pipeline.sampling.draw_next import UNKNOWN
from pipeline.sampling.order_strip import order_strip, states, veiled
from pipeline.sampling.pipeline import Pipeline
from pipeline.text_tokenizer.bpe import TextTokenizer
from pipeline.transformer.layout import Layout
from tests.sampling.test_packed import built


@pytest.mark.parametrize(
    ("order", "counts"),
    [("raster", list(range(1, 21))), ("any", [4, 7, 10, 14, 17, 20]), ("scale", [4, 20])],
)
def test_the_states_of_an_image_grow_to_the_image_that_is_generated(order: str, counts: list[int]) -> None:
    tokenizer = build(
        VQVAEConfig.model_validate(
            {
                "kind": "vqvae",
                "patch_size": 4,
                "widths": [8],
                "blocks": 1,
                "quantizer": {
                    "kind": "multiscale",
                    "scales": [2, 4],
                    "codebook": {"kind": "ema", "codebook_size": 16, "code_width": 4},
                },
            }
        ),
        16,
    )
    text = TextTokenizer.train(["red heart", "blue cat"], TextTokenizerConfig(vocab_size=260, text_length=4))
    model = built(order, Layout.of(4, text.vocab_size, tokenizer.levels))
    sampling = SamplingConfig(passes=6, schedule="linear") if order == "any" else SamplingConfig()
    numbers = candidate_uniforms(3, 1, 0, numbers_per_image(model))[None]
    found = states(model, text.encode(["red heart"]), numbers, sampling)
    assert [int((codes != UNKNOWN).sum()) for codes in found] == counts
    for before, after in pairwise(found):
        assert torch.equal(before[before != UNKNOWN], after[before != UNKNOWN])
    pipeline = Pipeline(text, model, tokenizer)
    last = pipeline.generate(["red heart"], seed=3, first_prompt=1, sampling=sampling)[0].image
    assert pipeline.decode(found[-1][None])[0].tobytes() == last.tobytes()
    strip = order_strip(pipeline, "red heart", 1, 3, sampling)
    assert strip.width > 4 * 128


def test_what_is_not_there_yet_is_veiled() -> None:
    image = Image.new("RGB", (8, 8), (255, 0, 128))
    found = np.asarray(veiled(image, torch.tensor([True, False, True, True]), Level(2, 2, 16)))
    assert (found[4:] == (255, 0, 128)).all()
    assert (found[:4, :4] == (255, 0, 128)).all()
    assert (found[:4, 4:] == (178, 76, 128)).all()
