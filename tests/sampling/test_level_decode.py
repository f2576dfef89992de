"""Promises of pipeline/sampling/level_decode.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline.config.generate import SamplingConfig
from pipeline.config.pipeline import load_pipeline
from pipeline.config.transformer import TransformerShape
from pipeline.core.errors import UserError
from pipeline.sampling.checks import check_compiler, check_sampling
from pipeline.sampling.decode import candidate_uniforms, draw_codes, log_likelihood
from pipeline.sampling.draw_next import UNKNOWN
from pipeline.sampling.row_batch import RowBatch
from pipeline.transformer.build import build_transformer
from pipeline.transformer.layout import Layout
from pipeline.transformer.next_scale import NextScaleTransformer
from tests.conftest import TINY

LAYOUT = Layout.of(4, 40, [(1, 1, 8), (2, 2, 8), (4, 4, 32)])
TEXT = torch.randint(0, 40, (3, 4), generator=torch.Generator().manual_seed(5))
PAIRS = [(i, j) for i in range(3) for j in range(3)]


def built() -> NextScaleTransformer:
    torch.manual_seed(1)
    shape = {"layers": 3, "width": 32, "heads": 4, "kv_heads": 2, "style": "modern", "order": "scale"}
    model = build_transformer(LAYOUT, TransformerShape.model_validate(shape)).eval()
    assert isinstance(model, NextScaleTransformer)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def drawn(
    model: NextScaleTransformer, pairs: list[tuple[int, int]], sampling: SamplingConfig, known_PN: Tensor | None = None
) -> Tensor:
    numbers = torch.stack([candidate_uniforms(0, i, j, LAYOUT.image_length) for i, j in pairs])
    return draw_codes(model, TEXT, torch.tensor([i for i, _ in pairs]), numbers, sampling, known_PN)


@pytest.mark.parametrize("sampling", [SamplingConfig(), SamplingConfig(guidance=3.0, top_k=6)])
def test_an_image_is_the_same_whoever_shares_its_batch(
    sampling: SamplingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = built()
    together = drawn(model, PAIRS, sampling)
    assert len({tuple(row.tolist()) for row in together}) == len(PAIRS)
    assert together[:, :5].max() < 8 <= together[:, 5:].max()
    for row, pair in enumerate(PAIRS):
        assert torch.equal(drawn(model, [pair], sampling)[0], together[row])
    monkeypatch.setattr("pipeline.sampling.logits._LOGITS_AT_ONCE", 5 * 9 * 32)  # a level in parts
    assert torch.equal(drawn(model, PAIRS, sampling), together)


@torch.no_grad()
def test_at_temperature_0_each_level_is_the_likeliest_of_the_full_pass_with_guidance_that_grows_by_level() -> None:
    model, seen = built(), []
    sampling = SamplingConfig(temperature=0, guidance=3.0, guidance_schedule="linear")
    numbers = candidate_uniforms(0, 0, 0, LAYOUT.image_length)[None]
    codes = draw_codes(
        model, TEXT[:1], torch.tensor([0]), numbers, sampling, on_code=lambda there, now: seen.append((there, now))
    )
    assert [there for there, _ in seen] == [1, 5, 21]
    assert torch.equal(seen[-1][1], codes)
    assert (seen[0][1][:, 1:] == 0).all()
    logits = [
        [hidden @ weight.T for hidden, weight in model.hidden_and_head_weights(text, codes)][1:]
        for text in (TEXT[:1], torch.zeros_like(TEXT[:1]))
    ]
    best = [(u + s * (p - u)).argmax(-1) for p, u, s in zip(*logits, (1.0, 2.0, 3.0), strict=True)]
    assert torch.equal(torch.cat(best, dim=1), codes)


def test_the_temperature_goes_from_the_first_level_to_the_last() -> None:
    model = built()
    hot = drawn(model, PAIRS, SamplingConfig(temperature=2))
    cooling = drawn(model, PAIRS, SamplingConfig(temperature=2, temperature_end=0))
    assert torch.equal(cooling[:, :1], hot[:, :1])
    known = cooling[:1].repeat(3, 1)
    known[:, 5:] = UNKNOWN
    cold = drawn(model, PAIRS[:1], SamplingConfig(temperature=0), known)
    assert torch.equal(cold[0], cooling[0])


def test_known_codes_stay_and_coarser_ones_are_seen_by_what_is_drawn() -> None:
    model = built()
    free = drawn(model, PAIRS, SamplingConfig())
    known = free[0].repeat(3, 1)
    known[:, 7:11] = UNKNOWN
    filled = drawn(model, PAIRS, SamplingConfig(), known)
    stays = known[0] != UNKNOWN
    assert (filled[:, stays] == known[0, stays]).all()
    known[:, 2] = (known[0, 2] + 1) % 8
    assert not torch.equal(drawn(model, PAIRS, SamplingConfig(), known)[:, 7:11], filled[:, 7:11])
    whole = free[:3].clone()
    assert torch.equal(drawn(model, PAIRS, SamplingConfig(), whole), whole[[i for i, _ in PAIRS]])
    coarse = whole.clone()
    coarse[:, 5:] = UNKNOWN  # a variation: the free drawing's own numbers and coarse codes give its fine ones
    assert torch.equal(drawn(model, PAIRS[::3], SamplingConfig(), coarse)[0], free[0])


@torch.no_grad()
def test_fillings_are_ranked_by_what_stays_given_what_was_drawn() -> None:
    model = built()
    codes = drawn(model, PAIRS[:2], SamplingConfig())
    known = codes[0].clone()
    known[[1, 7]] = UNKNOWN
    factors = model.hidden_and_head_weights(TEXT[:2], codes)[1:]
    placed = codes.split([1, 4, 16], dim=1)
    each = torch.cat(
        [
            (h @ w.T).log_softmax(-1).gather(-1, own[..., None])[..., 0]
            for (h, w), own in zip(factors, placed, strict=True)
        ],
        dim=1,
    )
    counted = (known != UNKNOWN) & (torch.arange(21) >= 5)  # levels behind the first hole's
    torch.testing.assert_close(log_likelihood(model, TEXT[:2], codes, known), (each * counted).sum(1))


def test_a_config_whose_tokenizer_has_one_level_is_refused_before_anything_is_trained() -> None:
    with pytest.raises(
        UserError, match=r"transformer.order=scale needs an image tokenizer of several levels, found one"
    ):
        load_pipeline(TINY, ["transformer.order=scale"])
    quantizers = ("{kind: multiscale, scales: [1, 2]}", "{kind: ema, depth: 2}")
    for quantizer in quantizers:
        load_pipeline(
            TINY, ["transformer.order=scale", f"image_tokenizer.model={{kind: vqvae, quantizer: {quantizer}}}"]
        )
    with pytest.raises(
        UserError, match=r"generate.sampling.passes: expected transformer.order any, found scale: leave it"
    ):
        load_pipeline(
            TINY,
            ["transformer.order=scale", "image_tokenizer.model={kind: vqvae2}", "generate.sampling.passes=4"],
        )


def test_what_a_next_scale_model_cannot_do_is_refused_in_one_line() -> None:
    model = built()
    for given in ({"passes": 4}, {"schedule": "linear"}, {"pass_order": "halton"}):
        with pytest.raises(UserError, match=f"^{next(iter(given))}: expected transformer.order any, found scale"):
            check_sampling(SamplingConfig.model_validate(given), model.layout, model.shape, True)
    with pytest.raises(UserError, match="^speculate: expected transformer.order raster, found scale: leave it out"):
        check_sampling(SamplingConfig(speculate=4), model.layout, model.shape, True)
    with pytest.raises(UserError, match="^--compile .* of order raster, found scale: leave it out"):
        check_compiler(model)
    with pytest.raises(UserError, match="^expected a transformer of order raster, .* found scale: take a PassBatch"):
        RowBatch(model, 2)
