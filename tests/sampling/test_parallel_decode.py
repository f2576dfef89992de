"""Promises of pipeline/sampling/parallel_decode.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pipeline.config.generate import SamplingConfig
from pipeline.config.transformer import TransformerShape
from pipeline.core.errors import UserError
from pipeline.sampling.checks import check_compiler, check_sampling
from pipeline.sampling.decode import candidate_uniforms, draw_codes, log_likelihood, numbers_per_image
from pipeline.sampling.draw_next import UNKNOWN
from pipeline.sampling.parallel_decode import codes_per_pass, halton_ranks
from pipeline.sampling.row_batch import RowBatch
from pipeline.transformer.any_order import AnyOrderTransformer
from pipeline.transformer.build import build_transformer
from pipeline.transformer.layout import Layout
from pipeline.transformer.model import Transformer

LAYOUT = Layout.of(4, 40, [(2, 2, 8), (4, 4, 32)])
TEXT = torch.randint(0, 40, (3, 4), generator=torch.Generator().manual_seed(5))
PAIRS = [(i, j) for i in range(3) for j in range(3)]


def built(order: str = "any") -> Transformer:
    torch.manual_seed(1)
    shape = {"layers": 3, "width": 32, "heads": 4, "kv_heads": 2, "style": "modern", "order": order}
    model = build_transformer(LAYOUT, TransformerShape.model_validate(shape)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def drawn(
    model: Transformer,
    pairs: list[tuple[int, int]],
    sampling: SamplingConfig,
    known_PN: Tensor | None = None,
    on_code: Callable[[int, Tensor], object] | None = None,
) -> Tensor:
    numbers = torch.stack([candidate_uniforms(0, i, j, numbers_per_image(model)) for i, j in pairs])
    return draw_codes(model, TEXT, torch.tensor([i for i, _ in pairs]), numbers, sampling, known_PN, on_code)


@pytest.mark.parametrize("pass_order", ["random", "confidence"])
def test_a_pass_over_many_codes_of_a_large_codebook_makes_a_few_logits_at_a_time(
    pass_order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = Layout.of(4, 40, [(8, 8, 2**13)])
    model = build_transformer(layout, TransformerShape(layers=2, width=8, heads=1, order="any")).eval()
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(1))
    made: list[int] = []
    whole = model.level_logits

    def counted(hidden: Tensor, level: int) -> Tensor:
        logits = whole(hidden, level)
        made.append(logits.numel())
        return logits

    monkeypatch.setattr(model, "level_logits", counted)
    sampling = SamplingConfig.model_validate({"passes": 1, "pass_order": pass_order})
    together = drawn(model, PAIRS, sampling)
    assert sum(made) == len(PAIRS) * 64 * 2**13
    assert max(made) <= 2**22
    assert torch.equal(drawn(model, PAIRS[4:5], sampling)[0], together[4])


@pytest.mark.parametrize("pass_order", ["random", "halton", "confidence"])
@pytest.mark.parametrize("others", [{"passes": 6}, {"passes": 7, "guidance": 3.0, "top_k": 6, "schedule": "linear"}])
def test_an_image_is_the_same_whoever_shares_its_batch(pass_order: str, others: dict[str, object]) -> None:
    model, sampling = built(), SamplingConfig.model_validate({"pass_order": pass_order, **others})
    together = drawn(model, PAIRS, sampling)
    assert len({tuple(row.tolist()) for row in together}) == len(PAIRS)
    assert together[:, :4].max() < 8 <= together[:, 4:].max()
    for row, pair in enumerate(PAIRS):
        assert torch.equal(drawn(model, [pair], sampling)[0], together[row])


@pytest.mark.parametrize("pass_order", ["random", "halton", "confidence"])
@torch.no_grad()
def test_one_code_a_pass_at_temperature_0_follows_the_full_pass_in_the_order_of_the_passes(
    pass_order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = built()
    assert isinstance(model, AnyOrderTransformer)
    seen: list[Tensor] = []

    def look(there: int, codes: Tensor) -> None:
        assert there == len(seen) + 1
        seen.append(codes.clone())

    sampling = SamplingConfig.model_validate({"pass_order": pass_order, "temperature": 0, "guidance": 2.5})
    numbers = candidate_uniforms(0, 0, 0, numbers_per_image(model))[None]
    asked: list[int] = []
    ask = model.read_and_ask

    def listen(codes: Tensor, positions: Tensor, *others: object) -> Tensor:
        asked.extend(positions[0].tolist())
        hidden: Tensor = ask(codes, positions, *others)
        return hidden

    monkeypatch.setattr(model, "read_and_ask", listen)
    codes = draw_codes(model, TEXT[:1], torch.tensor([0]), numbers, sampling, on_code=look)
    order = torch.tensor([[*asked, *({*range(20)} - {*asked})]])  # the last one is never read
    assert sorted(asked[:4]) == [0, 1, 2, 3]
    assert torch.equal(seen[-1], codes)
    logits = [
        [hidden @ weight.T for hidden, weight in model.hidden_and_head_weights(text, codes, order)][1:]
        for text in (TEXT[:1], torch.zeros_like(TEXT[:1]))
    ]
    best = [(u + 2.5 * (p - u)).argmax(-1) for p, u in zip(*logits, strict=True)]
    assert torch.equal(torch.cat(best, dim=1), codes.gather(1, order))


@torch.no_grad()
def test_by_confidence_the_surest_codes_of_a_pass_stay() -> None:
    model = built()
    shown: list[Tensor] = []
    assert isinstance(model, AnyOrderTransformer)
    sampling = SamplingConfig(pass_order="confidence", temperature=0, passes=10, schedule="linear")
    drawn(model, [(2, 0)], sampling, on_code=lambda _, codes: shown.append(codes.clone()))
    cache, nothing = model.new_cache(1), torch.zeros(1, 0, dtype=torch.int64)
    model.read_text(TEXT[2:], cache)
    hidden = model.read_and_ask(nothing, nothing, torch.arange(4)[None], cache, 0)
    sure, best = model.level_logits(hidden, 0)[0].softmax(-1).max(-1)
    first = sure.topk(2).indices
    assert torch.equal(shown[0][0, first], best[first])
    assert shown[0].count_nonzero() == best[first].count_nonzero() == 2


@pytest.mark.parametrize("pass_order", ["random", "halton", "confidence"])
def test_a_hole_is_filled_from_all_sides(pass_order: str) -> None:
    model, sampling = built(), SamplingConfig.model_validate({"passes": 8, "pass_order": pass_order})
    free = drawn(model, PAIRS, sampling)
    known = free[0].repeat(3, 1)
    known[:, [1, 9, 10]] = UNKNOWN
    filled = drawn(model, PAIRS, sampling, known)
    stays = known[0] != UNKNOWN
    assert (filled[:, stays] == known[0, stays]).all()
    known[:, 19] = (known[0, 19] + 1) % 32  # behind the hole
    assert not torch.equal(drawn(model, PAIRS, sampling, known)[:, [9, 10]], filled[:, [9, 10]])
    whole = free[:3].clone()
    assert torch.equal(drawn(model, PAIRS, sampling, whole), whole[[i for i, _ in PAIRS]])


@torch.no_grad()
def test_fillings_are_ranked_by_what_stays_given_what_was_drawn() -> None:
    model = built()
    assert isinstance(model, AnyOrderTransformer)
    codes = drawn(model, PAIRS[:2], SamplingConfig())
    known = codes[0].clone()
    known[[2, 7, 8]] = UNKNOWN
    order = torch.tensor([[2, 0, 1, 3, 7, 8, 4, 5, 6, *range(9, 20)]]).expand(2, -1)
    factors = model.hidden_and_head_weights(TEXT[:2], codes, order)[1:]
    placed = codes.gather(1, order).split([4, 16], dim=1)
    each = [
        (h @ w.T).log_softmax(-1).gather(-1, own[..., None])[..., 0]
        for (h, w), own in zip(factors, placed, strict=True)
    ]
    expected = each[0][:, 1:].sum(1) + each[1][:, 2:].sum(1)
    torch.testing.assert_close(log_likelihood(model, TEXT[:2], codes, known), expected)


def test_the_temperature_goes_from_the_first_pass_to_the_last_of_each_level() -> None:
    model = built()
    cold = drawn(model, PAIRS, SamplingConfig(passes=2, temperature=0))
    ends_cold = SamplingConfig(passes=8, schedule="linear", temperature=3, temperature_end=0)
    assert [ends_cold.in_pass(i, 3).temperature for i in range(3)] == [3, 1.5, 0]
    free = drawn(model, PAIRS, ends_cold)
    assert not torch.equal(free, drawn(model, PAIRS, SamplingConfig(passes=8, schedule="linear", temperature=3)))
    same = SamplingConfig(passes=2, temperature=0, temperature_end=0)
    assert torch.equal(drawn(model, PAIRS, same), cold)
    # A level of one pass has its first temperature.
    assert torch.equal(drawn(model, PAIRS, SamplingConfig(passes=2, temperature=0, temperature_end=5)), cold)
    with pytest.raises(
        UserError, match=r"^temperature_end: expected transformer.order any or scale, found raster: leave"
    ):
        check_sampling(
            ends_cold.model_copy(update={"passes": None, "schedule": "cosine"}),
            built("raster").layout,
            built("raster").shape,
            True,
        )


def test_passes_draw_every_code_once_and_cosine_begins_with_few() -> None:
    one = Layout.of(4, 40, [(16, 16, 8)])
    assert codes_per_pass(one, [256], SamplingConfig()) == [[1] * 256]
    assert codes_per_pass(one, [256], SamplingConfig(passes=256, schedule="linear")) == [[1] * 256]
    assert codes_per_pass(one, [256], SamplingConfig(passes=32, schedule="linear")) == [[8] * 32]
    (cosine,) = codes_per_pass(one, [256], SamplingConfig(passes=32))
    assert (len(cosine), sum(cosine), min(cosine)) == (32, 256, 1)
    assert cosine[0] == 1 < 8 < cosine[-1] == max(cosine)
    for passes in range(2, 21):
        found = codes_per_pass(LAYOUT, [4, 16], SamplingConfig(passes=passes))
        assert [sum(own) for own in found] == [4, 16]
        assert min(map(min, found)) >= 1
        assert sum(map(len, found)) in (passes, passes - 1)
    assert codes_per_pass(LAYOUT, [0, 3], SamplingConfig(passes=20)) == [[], [1, 1, 1]]


def test_the_halton_order_spreads_over_the_grid() -> None:
    ranks = torch.tensor(halton_ranks(8, 8)).view(8, 8)
    assert sorted(ranks.flatten().tolist()) == list(range(64))
    early = (ranks < 16).float()
    quarters = early.view(2, 4, 2, 4).sum(dim=(1, 3))
    assert quarters.min() >= 3
    assert quarters.max() <= 5


def test_what_a_model_of_one_order_cannot_do_is_refused_in_one_line() -> None:
    raster, model = built("raster"), built()
    with pytest.raises(UserError, match=r"^passes: expected 2 to 20, one for each level to .*, found 21$"):
        check_sampling(SamplingConfig(passes=21), model.layout, model.shape, True)
    with pytest.raises(UserError, match="passes: expected 2 to 20"):
        check_sampling(SamplingConfig(passes=1), model.layout, model.shape, True)
    check_sampling(SamplingConfig(passes=20), model.layout, model.shape, True)
    for given in ({"passes": 4}, {"schedule": "linear"}, {"pass_order": "halton"}):
        with pytest.raises(UserError, match=f"^{next(iter(given))}: expected transformer.order any, found raster"):
            check_sampling(SamplingConfig.model_validate(given), raster.layout, raster.shape, True)
    with pytest.raises(UserError, match="^--compile .* of order raster, found any: leave it out"):
        check_compiler(model)
    with pytest.raises(UserError, match="^expected a transformer of order raster, .* found any"):
        RowBatch(model, 2)
