"""What ranks the ways to fill a hole."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from pipeline.config.text_tokenizer import TextTokenizerConfig
from pipeline.config.transformer import TransformerShape
from pipeline.core.errors import UserError
from pipeline.image_tokenizer.base import build
from pipeline.sampling.decode import UNKNOWN, log_likelihood
from pipeline.sampling.image_prompt import ImagePrompt, extended
from pipeline.sampling.pipeline import Pipeline
from pipeline.text_tokenizer.bpe import TextTokenizer
from pipeline.transformer import cross_entropy
from pipeline.transformer.build import build_transformer
from pipeline.transformer.layout import Layout
from pipeline.transformer.model import Transformer


@pytest.mark.parametrize("positions", [2, 1000])
def test_log_likelihood_is_that_of_known_codes_behind_the_hole(positions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cross_entropy._CHUNK_ELEMENTS, "cpu", positions * 16)  # of the finer level
    torch.manual_seed(0)
    layout = Layout.of(3, 20, [(1, 2, 8), (2, 3, 16)])
    model = Transformer(layout, TransformerShape(layers=1, width=16, heads=2)).eval()
    torch.nn.init.normal_(model.head.weight)
    text = torch.randint(0, 20, (2, 3))
    codes = torch.cat([torch.randint(0, 8, (2, 2)), torch.randint(0, 16, (2, 6))], dim=1)
    known = torch.tensor([1, UNKNOWN, 1, 1, UNKNOWN, 1, 1, 1])
    with torch.no_grad():
        _, logits = model(text, codes)
    of_each = [
        own.log_softmax(-1).gather(-1, target[..., None])[..., 0]
        for own, target in zip(logits, codes.split([2, 6], dim=1), strict=True)
    ]
    expected = torch.cat(of_each, dim=1)[:, [2, 3, 5, 6, 7]].sum(dim=1)
    torch.testing.assert_close(log_likelihood(model, text, codes, known), expected)


def _hole(*box: int) -> ImagePrompt:
    mask = Image.new("L", (16, 16))
    mask.paste(255, box)
    return ImagePrompt(Image.new("RGB", (16, 16)), mask=mask)


@pytest.mark.parametrize(
    ("order", "ranked", "unranked"),
    [
        (
            "raster",
            extended(Image.new("RGB", (16, 16)), {"top": 4}),
            extended(Image.new("RGB", (16, 16)), {"bottom": 4}),
        ),
        ("any", extended(Image.new("RGB", (16, 16)), {"bottom": 4}), _hole(0, 0, 16, 16)),
        ("scale", _hole(0, 0, 9, 9), _hole(0, 0, 4, 4)),  # the second one lies in the finest level alone
    ],
)
def test_candidates_that_nothing_tells_apart_are_not_kept_as_the_best(
    order: str, ranked: ImagePrompt, unranked: ImagePrompt
) -> None:
    torch.manual_seed(0)
    text = TextTokenizer.train(["red joker", "Brazil"], TextTokenizerConfig(vocab_size=270, text_length=6))
    scales = {"kind": "multiscale", "scales": [1, 3, 4], "codebook": {"kind": "ema", "codebook_size": 16}}
    quantizer = scales if order == "scale" else {"kind": "ema", "codebook_size": 16}
    tokenizer = build({"kind": "vqvae", "quantizer": quantizer, "widths": [8, 8, 8]}, image_size=16).eval()
    shape = TransformerShape.model_validate({"layers": 2, "width": 32, "heads": 2, "order": order})
    layout = Layout.of(text.text_length, text.vocab_size, tokenizer.levels)
    model = build_transformer(layout, shape).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    pipeline = Pipeline(text, model, tokenizer)
    scores = [one.score for one in pipeline.generate(["Brazil"], 4, keep=3, image_prompt=ranked)]
    assert len(set(scores)) == 3
    with pytest.raises(UserError, match="^keep: expected something that stays behind the hole") as caught:
        pipeline.generate(["Brazil"], 4, keep=3, image_prompt=unranked)
    assert "\n" not in str(caught.value)
    assert len(pipeline.generate(["Brazil"], 2, image_prompt=unranked)) == 2
