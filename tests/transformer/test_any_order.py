"""Promises of pipeline/transformer/any_order.py and orders.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.config.transformer import TransformerConfig, TransformerShape
from pipeline.core.errors import UserError
from pipeline.transformer.any_order import AnyOrderTransformer
from pipeline.transformer.build import build_transformer, load_transformer
from pipeline.transformer.layout import Layout
from pipeline.transformer.model import Transformer
from pipeline.transformer.objective import JointObjective
from pipeline.transformer.orders import random_orders
from tests.transformer.test_model import batch

LAYOUTS = [Layout.of(5, 40, [(3, 4, 16)]), Layout.of(1, 30, [(1, 1, 4), (2, 2, 8), (4, 3, 32)])]
SHAPES: list[dict[str, object]] = [
    {},
    {"qk_norm": False, "kv_heads": 2, "norm": "layernorm", "mlp": "gelu", "base_head_width": 4},
    {"style": "modern"},
    {"style": "modern", "kv_heads": 1, "layers": 2},
]


def built(layout: Layout, **shape: object) -> AnyOrderTransformer:
    torch.manual_seed(1)
    values = {"layers": 3, "width": 32, "heads": 4, "order": "any", **shape}
    model = build_transformer(layout, TransformerShape.model_validate(values)).eval()
    assert isinstance(model, AnyOrderTransformer)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def logits_of(model: AnyOrderTransformer, text: Tensor, codes: Tensor, order: Tensor) -> list[Tensor]:
    return [hidden @ weight.T for hidden, weight in model.hidden_and_head_weights(text, codes, order)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_cached_logits_equal_the_full_pass_in_any_order_and_training_those_of_inference(
    layout: Layout, shape: dict[str, object]
) -> None:
    model = built(layout, **shape)
    text, codes = batch(layout)
    order = random_orders(codes, layout, seed=3, step=0)
    training = logits_of(model, text, codes, order)
    with torch.no_grad():
        expected = logits_of(model, text, codes, order)
        for one, other in zip(training, expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
        cache = model.new_cache(len(text))
        model.read_text(text, cache)
        for place in range(layout.image_length):
            level = layout.level_at(place)
            # At once: the code that comes, and the level's last, from what is there.
            asked = order[:, [place, layout.level_starts[level] + layout.levels[level].positions - 1]]
            read = order[:, max(place - 1, 0) : place]
            hidden = model.read_and_ask(codes.gather(1, read), read, asked, cache, max(place - 1, 0))
            own = expected[1 + level][:, place - layout.level_starts[level]]
            torch.testing.assert_close(model.level_logits(hidden[:, 0], level), own, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_several_codes_read_at_once_are_the_same_codes_read_one_by_one() -> None:
    layout = LAYOUTS[1]
    model = built(layout, style="modern", kv_heads=2)
    text, codes = batch(layout)
    order = random_orders(codes, layout, seed=0, step=0)
    expected = logits_of(model, text, codes, order)[3]
    cache = model.new_cache(len(text))
    model.read_text(text, cache)
    read = order[:, :7]
    model.read_and_ask(codes.gather(1, read), read, order[:, 7:8], cache, 0)
    read = order[:, 7:11]
    hidden = model.read_and_ask(codes.gather(1, read), read, order[:, 11:12], cache, 7)
    torch.testing.assert_close(model.level_logits(hidden[:, 0], 2), expected[:, 6], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grad", [True, False])
def test_a_place_is_predicted_from_text_and_earlier_places_only_and_text_from_no_code(
    layout: Layout, grad: bool
) -> None:
    model = built(layout, style="modern")
    text, codes = batch(layout)
    order = random_orders(codes, layout, seed=0, step=4)
    with torch.set_grad_enabled(grad):
        text_before, *before = logits_of(model, text, codes, order)
        for place in range(layout.image_length):
            changed = codes.clone()
            size = layout.levels[layout.level_at(place)].codebook_size
            changed.scatter_add_(1, order[:, place : place + 1], torch.ones(len(codes), 1, dtype=torch.int64))
            changed.scatter_(1, order[:, place : place + 1], changed.gather(1, order[:, place : place + 1]) % size)
            text_after, *after = logits_of(model, text, changed, order)
            assert torch.equal(text_before, text_after)
            moved = torch.cat([(a - b).abs().amax(-1) for a, b in zip(before, after, strict=True)], 1) > 0
            assert not moved[:, : place + 1].any()
            assert moved[:, place + 1 :].all()


def test_random_orders_are_a_function_of_seed_step_and_sample_alone() -> None:
    layout = LAYOUTS[1]
    codes = torch.randint(0, 4, (64, 17), generator=torch.Generator().manual_seed(0))
    orders = random_orders(codes, layout, seed=1, step=9)
    for start, end in ((0, 1), (1, 5), (5, 17)):
        assert torch.equal(orders[:, start:end].sort(dim=1).values, torch.arange(start, end).expand(64, -1))
    assert torch.equal(random_orders(codes[[40, 7]], layout, seed=1, step=9), orders[[40, 7]])
    assert len({tuple(row) for row in orders.tolist()}) == 64
    for other in (random_orders(codes, layout, 2, 9), random_orders(codes, layout, 1, 10)):
        assert (orders != other).any(dim=1).all()
    first = torch.bincount(random_orders(torch.randint(0, 16, (4096, 12)), LAYOUTS[0], 0, 0)[:, 0], minlength=12)
    assert first.min() > 240  # of 341 expected, 5 standard deviations of 18
    assert first.max() < 440
    # Written down: with another function a resumed training would go on in other orders.
    assert orders[0].tolist() == [0, 4, 1, 3, 2, 11, 10, 7, 12, 14, 5, 6, 16, 8, 9, 13, 15]


def test_training_in_random_orders_learns_codes_by_heart_and_evaluation_is_the_same_each_time() -> None:
    layout = LAYOUTS[1]
    config = TransformerConfig.model_validate(
        {"layers": 2, "width": 32, "heads": 4, "order": "any", "style": "modern", "caption_dropout": 0.0}
    )
    torch.manual_seed(0)
    objective = JointObjective(build_transformer(layout, config), config, seed=5)
    text, codes = batch(layout, 8)
    learned = {"text": text, "codes": codes}
    optimizer = torch.optim.AdamW(objective.parameters(), lr=0.02)
    for step in range(30):
        loss, _ = objective.train()(learned, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        metrics = objective.eval()(learned, 0)[1]
        again = objective({"text": text.flip(0), "codes": codes.flip(0)}, 0)[1]
        order = random_orders(codes, layout, seed=5, step=0)
        logits = logits_of(objective.transformer, text, codes, order)[1:]  # type: ignore[arg-type]
        placed = codes.gather(1, order).split([own.shape[1] for own in logits], dim=1)
    losses = [-own.log_softmax(-1).gather(-1, at[..., None]) for own, at in zip(logits, placed, strict=True)]
    assert metrics["loss/image"] == pytest.approx(float(torch.cat(losses, dim=1).mean()), rel=1e-4)
    assert metrics["bits/image_token"] < 3.3  # 4.4 untrained; never saw these orders
    assert metrics["loss/image"] == pytest.approx(float(again["loss/image"]), rel=1e-5)
    assert metrics["loss/position"].shape == (layout.length,)
    assert all(parameter.grad is not None for parameter in objective.parameters())


def test_an_anneal_goes_from_raster_to_random_orders_as_a_function_of_seed_step_and_sample() -> None:
    layout = LAYOUTS[1]
    codes = torch.randint(0, 4, (600, 17), generator=torch.Generator().manual_seed(0))
    raster, free = torch.arange(17).expand(600, -1), random_orders(codes, layout, seed=1, step=9)
    assert torch.equal(random_orders(codes, layout, 1, 9, share=0.0), raster)
    some = random_orders(codes, layout, 1, 9, share=0.3)
    moved = (some != raster).any(1)
    assert torch.equal(some[moved], free[moved])
    assert 130 < moved.sum() < 230
    assert torch.equal(random_orders(codes[[40, 7]], layout, 1, 9, share=0.3), some[[40, 7]])
    assert not torch.equal((random_orders(codes, layout, 1, 10, share=0.3) != raster).any(1), moved)
    grown = (random_orders(codes, layout, 1, 9, share=0.6) != raster).any(1)
    assert (grown | ~moved).all()
    # Written down, for a resumed training.
    assert moved[:24].nonzero()[:, 0].tolist() == [1, 2, 3, 10, 13, 14, 15, 16, 20]


def test_training_anneals_orders_and_evaluation_does_not() -> None:
    layout = LAYOUTS[0]
    values = {"layers": 2, "width": 32, "heads": 4, "order": "any", "caption_dropout": 0.0, "order_anneal": [10, 20]}
    config = TransformerConfig.model_validate(values)
    torch.manual_seed(0)
    objective = JointObjective(build_transformer(layout, config), config, seed=5)
    for parameter in objective.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    text, codes = batch(layout, 8)

    def loss(step: int, training: bool) -> float:
        return float(objective.train(training)({"text": text, "codes": codes}, step)[1]["loss/image"])

    def of(order: Tensor) -> float:
        hidden = logits_of(objective.transformer, text, codes, order)[1]  # type: ignore[arg-type]
        return float(-hidden.detach().log_softmax(-1).gather(-1, codes.gather(1, order)[..., None]).mean())

    raster = of(torch.arange(12).expand(8, -1))
    assert [loss(step, True) for step in (0, 10)] == pytest.approx([raster] * 2)
    assert loss(20, True) == pytest.approx(of(random_orders(codes, layout, 5, 20)))
    assert loss(15, True) == pytest.approx(of(random_orders(codes, layout, 5, 15, share=0.5)))
    assert loss(0, False) == pytest.approx(of(random_orders(codes, layout, 5, 0)))
    for wrong, complaint in (
        ({"order": "raster"}, "order any, found raster"),
        ({"order_anneal": [4, 4]}, "two ris"),
    ):
        with pytest.raises(ValueError, match=f"order_anneal: expected {complaint}"):
            TransformerConfig.model_validate(values | wrong)


def test_a_folder_of_any_order_loads_as_such_and_one_of_raster_says_nothing_of_orders(tmp_path: Path) -> None:
    layout = LAYOUTS[0]
    model = built(layout)
    model.save_pretrained(tmp_path / "any")
    text, codes = batch(layout)
    loaded = load_transformer(tmp_path / "any")
    with torch.no_grad():
        for one, other in zip(loaded(text, codes)[1], model(text, codes)[1], strict=True):
            assert torch.equal(one, other)
    with pytest.raises(UserError, match="Transformer: expected order raster, found any"):
        Transformer.from_pretrained(tmp_path / "any")
    raster = Transformer(layout, TransformerShape(layers=2, width=32, heads=4))
    raster.save_pretrained(tmp_path / "raster")
    assert "order" not in (tmp_path / "raster" / "config.json").read_text()
    assert type(load_transformer(tmp_path / "raster")) is Transformer


def test_any_order_has_about_the_parameters_of_raster() -> None:
    counts = []
    for order in ("raster", "any"):
        shape = TransformerShape.model_validate({"layers": 6, "width": 64, "heads": 4, "order": order})
        counts.append(sum(p.numel() for p in build_transformer(LAYOUTS[0], shape).parameters()))
    assert counts[1] == pytest.approx(counts[0], rel=0.01)


def test_settings_that_any_order_cannot_have_are_refused() -> None:
    with pytest.raises(ValueError, match="order any needs attention full, found sparse"):
        TransformerShape.model_validate({"order": "any", "style": "classic"})
    with pytest.raises(ValueError, match="order any needs at least 2 layers"):
        TransformerShape.model_validate({"order": "any", "layers": 1})
