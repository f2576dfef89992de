"""Promises of pipeline/transformer/bit_groups.py and pipeline/sampling/digit_decode.py."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.config.base import parse_config
from pipeline.config.generate import SamplingConfig
from pipeline.config.transformer import TransformerConfig, TransformerShape
from pipeline.core.errors import UserError
from pipeline.sampling.checks import check_compiler, check_sampling
from pipeline.sampling.decode import draw_codes, log_likelihood, numbers_per_image
from pipeline.sampling.draw_next import UNKNOWN
from pipeline.transformer.bit_groups import GroupedTransformer, digit_sizes
from pipeline.transformer.build import build_transformer, load_transformer
from pipeline.transformer.layout import Layout
from pipeline.transformer.model import Transformer
from pipeline.transformer.objective import JointObjective
from pipeline.transformer.start import OtherWeights
from tests.transformer.test_model import batch

LAYOUTS = [Layout.of(3, 40, [(2, 3, 36)]), Layout.of(1, 30, [(1, 2, 16), (2, 2, 24)])]
LOSS = {"text_loss_weight": 0, "image_loss_weight": 1, "caption_dropout": 0}
SMALL: dict[str, object] = {"layers": 2, "width": 32, "heads": 4, "code_groups": 2}


def built(layout: Layout, **shape: object) -> GroupedTransformer:
    torch.manual_seed(1)
    model = build_transformer(layout, TransformerShape.model_validate(SMALL | shape)).eval()
    assert isinstance(model, GroupedTransformer)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def log_p(model: GroupedTransformer, hidden_BD: Tensor, level: int) -> Tensor:
    """Of every code [B, K], digit by digit from `digit_logits`."""
    found = []
    for code in range(model.layout.levels[level].codebook_size):
        digits = model.digits(torch.full((len(hidden_BD),), code), level)
        each = [model.digit_logits(hidden_BD, digits[:i], level).log_softmax(-1) for i in range(len(digits))]
        own = [p.gather(1, digit[:, None])[:, 0] for p, digit in zip(each, digits, strict=True)]
        found.append(torch.stack(own).sum(0))
    return torch.stack(found, dim=1)


def test_digits_are_even_factors_and_their_product_is_the_codebook() -> None:
    assert [digit_sizes(2**bits, 2) for bits in (10, 13, 16, 18)] == [(32, 32), (128, 64), (256, 256), (512, 512)]
    assert digit_sizes(2**18, 3) == (64, 64, 64)
    assert digit_sizes(8 * 8 * 8 * 5 * 5, 2) == (128, 100)
    for codes in (1021, 2 * 1021, 3):
        with pytest.raises(UserError, match=r"code_groups: expected codes that are 2 factors of about \d+, found"):
            digit_sizes(codes, 2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [{}, {"style": "modern"}, {"code_groups": 3, "norm": "layernorm"}], ids=str)
def test_the_loss_is_that_of_codes_whose_probabilities_sum_to_one(layout: Layout, shape: dict[str, object]) -> None:
    """Of training and evaluation: the same as code by code with a cache, over all codes."""
    if shape.get("code_groups") == 3:
        layout = Layout.of(layout.text_length, layout.text_vocab_size, [(2, 2, 24)])
    model = built(layout, **shape)
    text, codes = batch(layout)
    assert all(len(size) == model.shape.code_groups for size in model.sizes)
    with torch.no_grad():
        cache, expected = model.new_cache(len(text)), []
        hidden = model.read_text(text, cache)
        for index in range(layout.image_length):
            of_all = log_p(model, hidden, layout.level_at(index))
            torch.testing.assert_close(of_all.exp().sum(1), torch.ones(len(text)))
            expected.append(of_all.gather(1, codes[:, index, None])[:, 0])
            hidden = model.read_code(codes[:, index], index, cache)
    by_hand = -torch.stack(expected, dim=1)
    config = TransformerConfig.model_validate(SMALL | shape | LOSS)
    objective = JointObjective(model, config)
    for training in (False, True):
        loss, metrics = objective.train(training)({"text": text, "codes": codes}, 0)
        torch.testing.assert_close(loss.detach(), by_hand.mean())
    assert loss.requires_grad
    _, metrics = objective.eval()({"text": text, "codes": codes}, 0)
    torch.testing.assert_close(metrics["loss/position"][layout.text_length :], by_hand.mean(0))
    assert metrics["bits/image_token"] == pytest.approx(by_hand.mean().item() / math.log(2), rel=1e-4)
    known = torch.full((layout.image_length,), UNKNOWN)
    known[1:] = codes[0, 1:]
    torch.testing.assert_close(log_likelihood(model, text[:1], codes[:1], known), -by_hand[:1, 1:].sum(1))


def test_every_parameter_learns_and_codebooks_of_digits_are_not_decayed() -> None:
    model = built(LAYOUTS[1])
    objective = JointObjective(model, TransformerConfig.model_validate(SMALL)).train()
    text, codes = batch(LAYOUTS[1])
    loss, _ = objective({"text": text, "codes": codes}, 0)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    groups = model.parameter_groups()
    assert {id(p) for group in groups for p in group.parameters} == {id(p) for p in model.parameters()}
    assert any(p is model.given.weight for group in groups for p in group.undecayed)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_codes_are_drawn_as_often_as_their_probability_says(guidance: float) -> None:
    """The first code over 20,000 candidates; known ones stay, and who shares the batch changes nothing."""
    layout = Layout.of(3, 40, [(1, 2, 12)])
    model, (text, codes) = built(layout), batch(layout)
    count = numbers_per_image(model)
    assert count == 4
    uniforms = torch.rand(20_000, count, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    which = torch.zeros(len(uniforms), dtype=torch.int64)
    sampling = SamplingConfig(guidance=guidance)
    drawn = draw_codes(model, text[:1], which, uniforms, sampling)
    share = torch.bincount(drawn[:, 0], minlength=12) / len(drawn)
    with torch.no_grad():
        hidden = [model.read_text(rows, model.new_cache(1)) for rows in (text[:1], torch.zeros_like(text[:1]))]
    if guidance == 1:
        torch.testing.assert_close(share, log_p(model, hidden[0], 0)[0].exp(), atol=0.015, rtol=0)
    else:
        first = [model.digit_logits(own, [], 0) for own in hidden]
        guided = (first[1] + guidance * (first[0] - first[1])).softmax(-1)[0]
        torch.testing.assert_close(share.view(len(guided), -1).sum(1), guided, atol=0.015, rtol=0)
    assert torch.equal(draw_codes(model, text[:1], which[:7], uniforms[:7], sampling), drawn[:7])
    known = torch.full((1, 2), UNKNOWN)
    known[0, 1] = codes[0, 1]
    there = draw_codes(model, text[:1], which[:7], uniforms[:7], sampling, known)
    assert (there[:, 1] == codes[0, 1]).all()
    assert torch.equal(there[:, 0], drawn[:7, 0])


def test_it_is_saved_loaded_and_started_from(tmp_path: Path) -> None:
    model, (text, codes) = built(LAYOUTS[0]), batch(LAYOUTS[0])
    model.save_pretrained(tmp_path)
    loaded = load_transformer(tmp_path)
    for one, other in zip(model(text, codes)[1], loaded(text, codes)[1], strict=True):
        assert torch.equal(one, other)
    with pytest.raises(UserError, match="found raster with code_groups 2; load it with load_transformer"):
        Transformer.from_pretrained(tmp_path)
    again = built(LAYOUTS[0])
    other = OtherWeights(again, tmp_path)
    weight = again.get_parameter("head.weight")
    assert torch.equal(other.values(weight, torch.zeros_like(weight)), model.get_parameter("head.weight"))
    plain = build_transformer(LAYOUTS[0], TransformerShape.model_validate(SMALL | {"code_groups": 1}))
    head = plain.get_parameter("head.weight")
    taken = OtherWeights(plain, tmp_path).values(head, torch.zeros_like(head))
    assert (taken[LAYOUTS[0].text_vocab_size :] == 0).all()  # its codes are no digits: they begin fresh


def test_what_it_is_not_for_is_told_in_one_line() -> None:
    with pytest.raises(UserError, match="code_groups needs order raster, found any"):
        parse_config(TransformerConfig, SMALL | {"order": "any"}, "transformer")
    model = built(LAYOUTS[0])
    with pytest.raises(UserError, match="speculate: expected a transformer without code_groups"):
        check_sampling(SamplingConfig(speculate=4), model.layout, model.shape, guidance_trained=True)
    with pytest.raises(UserError, match="--compile .*: expected a transformer without code_groups"):
        check_compiler(model)
    assert "code_groups" not in built_plain().exported_config()["shape"]  # type: ignore[operator]


def built_plain() -> Transformer:
    return build_transformer(LAYOUTS[0], TransformerShape.model_validate(SMALL | {"code_groups": 1}))
