"""What ranks the ways to fill a hole."""

from __future__ import annotations

import pytest
import torch

from pipeline.config.transformer import TransformerShape
from pipeline.sampling.decode import UNKNOWN, log_likelihood
from pipeline.transformer import cross_entropy
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
