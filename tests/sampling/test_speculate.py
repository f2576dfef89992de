"""Speculation draws the codes of one-by-one drawing, in fewer passes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline.config.generate import SamplingConfig
from pipeline.config.transformer import TransformerShape
from pipeline.core.errors import UserError
from pipeline.sampling import decode, speculate
from pipeline.sampling.checks import check_sampling
from pipeline.sampling.decode import candidate_uniforms, draw_codes
from pipeline.sampling.draw_next import UNKNOWN
from pipeline.transformer.build import build_transformer
from pipeline.transformer.layout import Layout
from pipeline.transformer.model import Transformer

ONE, TWO = Layout.of(4, 40, [(6, 4, 32)]), Layout.of(4, 40, [(2, 2, 8), (4, 4, 32)])


def shape(**changed: object) -> TransformerShape:
    return TransformerShape.model_validate({"layers": 2, "width": 32, "heads": 4} | changed)


SHAPES = {
    "learned positions": (ONE, shape()),
    "rotary, shared keys, two levels": (TWO, shape(positions="rotary", kv_heads=2)),
    "sparse": (ONE, shape(attention="sparse", layers=4, conv_kernel=3)),
    "layer norm, GELU": (ONE, shape(norm="layernorm", mlp="gelu", qk_norm=False)),
}
TEXT = torch.randint(0, 40, (1, 4), generator=torch.Generator().manual_seed(5))


def built(layout: Layout, own: TransformerShape) -> Transformer:
    torch.manual_seed(1)
    model = Transformer(layout, own).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def drawn(model: Transformer, number: int, known: Tensor | None = None, **sampling: object) -> Tensor:
    uniforms = candidate_uniforms(0, number, 0, model.layout.image_length)[None]
    config = SamplingConfig.model_validate(sampling)
    return draw_codes(model, TEXT, torch.zeros(1, dtype=torch.int64), uniforms, config, known)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("step", [speculate.CachedWindowStep, speculate.ModelWindowStep])
def test_the_codes_are_those_of_one_by_one_drawing(
    name: str, guidance: float, step: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speculate, "CachedWindowStep", step)
    model = built(*SHAPES[name])
    for number, window in enumerate((2, 5, 16)):
        alone = drawn(model, number, guidance=guidance, temperature=0.7)
        assert torch.equal(drawn(model, number, guidance=guidance, temperature=0.7, speculate=window), alone)


def test_codes_that_are_known_stay_and_the_others_are_those_of_one_by_one_drawing() -> None:
    model = built(*SHAPES["learned positions"])
    known = torch.full((1, ONE.image_length), UNKNOWN)
    known[0, :3], known[0, 9:14] = 7, torch.arange(5)
    found = drawn(model, 3, known, speculate=6)
    assert found[0, 9:14].tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(found, drawn(model, 3, known))


def test_what_is_easy_to_guess_takes_fewer_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    really = speculate.draw_speculating
    monkeypatch.setattr(decode, "draw_speculating", lambda *a, **k: passes.append(really(*a, **k)))
    model = built(*SHAPES["learned positions"])
    with torch.no_grad():
        model.head.weight.zero_()  # at temperature 0 all codes are alike
    assert not drawn(model, 0, temperature=0, speculate=6).any()
    assert passes == [4]  # 24 codes: the first one from the prompt, then six a pass


def test_each_code_is_told_of_when_it_is_sure(monkeypatch: pytest.MonkeyPatch) -> None:
    model = built(*SHAPES["rotary, shared keys, two levels"])
    told: list[tuple[int, Tensor]] = []
    uniforms = candidate_uniforms(0, 0, 0, TWO.image_length)[None]
    found = draw_codes(
        model,
        TEXT,
        torch.zeros(1, dtype=torch.int64),
        uniforms,
        SamplingConfig(speculate=4),
        on_code=lambda count, codes: told.append((count, codes.clone())),
    )
    assert [count for count, _ in told] == sorted({count for count, _ in told})
    assert told[-1][0] == TWO.image_length
    assert all(torch.equal(codes[:, :count], found[:, :count]) for count, codes in told)


def test_a_model_of_order_any_is_refused() -> None:
    model = build_transformer(ONE, shape(order="any"))
    with pytest.raises(UserError, match="^speculate: expected transformer.order raster, found any: set passes instead"):
        check_sampling(SamplingConfig(speculate=8), model.layout, model.shape, guidance_trained=True)
