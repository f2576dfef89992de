"""Promises of pipeline/sampling/packed.py."""

from __future__ import annotations

import pytest
import torch

from pipeline.config.generate import SamplingConfig
from pipeline.config.image_tokenizer_model import VQVAEConfig
from pipeline.config.text_tokenizer import TextTokenizerConfig
from pipeline.config.transformer import TransformerShape
from pipeline.image_tokenizer.base import build
from pipeline.sampling.decode import candidate_uniforms, draw_codes, numbers_per_image
from pipeline.sampling.packed import PackedLinear, packed
from pipeline.sampling.pipeline import Pipeline
from pipeline.text_tokenizer.bpe import TextTokenizer
from pipeline.transformer.build import build_transformer
from pipeline.transformer.layout import Layout
from pipeline.transformer.model import Transformer

LAYOUT = Layout.of(4, 40, [(2, 2, 8), (4, 4, 32)])
VQVAE = {
    "kind": "vqvae",
    "patch_size": 4,
    "widths": [8],
    "blocks": 1,
    "quantizer": {"kind": "ema", "codebook_size": 16, "code_width": 4},
}
TEXT = torch.randint(0, 40, (3, 4), generator=torch.Generator().manual_seed(5))


def built(order: str, layout: Layout = LAYOUT, **shape: object) -> Transformer:
    torch.manual_seed(1)
    values = {"layers": 3, "width": 32, "heads": 4, "order": order, **shape}
    model = build_transformer(layout, TransformerShape.model_validate(values)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("order", ["any", "scale"])
@pytest.mark.parametrize(
    "shape", [{"style": "modern", "kv_heads": 2}, {"norm": "layernorm", "mlp": "gelu", "qk_norm": False}]
)
@torch.inference_mode()
def test_a_packed_model_has_the_logits_and_the_codes_of_the_model(order: str, shape: dict[str, object]) -> None:
    model = built(order, **shape)
    fast = packed(model)
    assert type(fast) is type(model)
    assert any(isinstance(module, PackedLinear) for module in fast.modules())
    assert fast.embedding.weight.data_ptr() == model.embedding.weight.data_ptr()
    codes = torch.randint(0, 8, (3, 20))
    for one, other in zip(fast(TEXT, codes)[1], model(TEXT, codes)[1], strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    numbers = torch.stack([candidate_uniforms(0, i, 0, numbers_per_image(model)) for i in range(3)])
    for sampling in (SamplingConfig(), SamplingConfig(guidance=2.0, temperature=0.7)):
        drawn = [draw_codes(each, TEXT, torch.arange(3), numbers, sampling) for each in (fast, model)]
        assert torch.equal(drawn[0], drawn[1])


def test_raster_and_other_precisions_are_taken_as_they_are() -> None:
    raster = built("raster")
    assert packed(raster) is raster
    narrow = built("any").bfloat16()
    assert packed(narrow) is narrow


def test_a_pipeline_draws_with_the_weights_that_its_transformer_has_now() -> None:
    tokenizer = build(VQVAEConfig.model_validate(VQVAE), 16)
    text = TextTokenizer.train(["red heart", "blue cat"], TextTokenizerConfig(vocab_size=260, text_length=4))
    model = built("any", Layout.of(4, text.vocab_size, tokenizer.levels))
    pipeline = Pipeline(text, model, tokenizer)
    before = pipeline.generate(["red heart"])[0].image
    assert pipeline.generate(["red heart"])[0].image.tobytes() == before.tobytes()
    with torch.no_grad():
        for block in model.blocks:
            block.get_parameter("mlp.out.weight").neg_()
    after = pipeline.generate(["red heart"])[0].image
    assert after.tobytes() != before.tobytes()
    assert Pipeline(text, model, tokenizer).generate(["red heart"])[0].image.tobytes() == after.tobytes()
