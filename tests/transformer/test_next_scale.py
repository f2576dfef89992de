"""Promises of pipeline/transformer/next_scale.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import pipeline.transformer.hf  # noqa: F401  # registers the models
from pipeline.config.transformer import TransformerConfig, TransformerShape
from pipeline.core.errors import UserError
from pipeline.transformer.build import build_transformer, load_transformer
from pipeline.transformer.layout import Layout
from pipeline.transformer.next_scale import NextScaleTransformer
from pipeline.transformer.objective import JointObjective, replace_codes
from tests.transformer.test_model import batch

# As a multiscale tokenizer's, as VQ-VAE-2's with sides that differ, and as a residual quantizer's.
LAYOUTS = [
    Layout.of(3, 30, [(1, 1, 8), (2, 2, 8), (3, 3, 8), (4, 4, 8)]),
    Layout.of(1, 20, [(2, 3, 16), (4, 6, 32)]),
    Layout.of(2, 20, [(2, 2, 8), (2, 2, 8), (2, 2, 8)]),
]
SHAPES: list[dict[str, object]] = [
    {},
    {"qk_norm": False, "kv_heads": 2, "norm": "layernorm", "mlp": "gelu"},
    {"style": "modern", "kv_heads": 1},
]


def built(layout: Layout, **shape: object) -> NextScaleTransformer:
    torch.manual_seed(1)
    values = {"layers": 2, "width": 32, "heads": 4, "order": "scale", **shape}
    model = build_transformer(layout, TransformerShape.model_validate(values)).eval()
    assert isinstance(model, NextScaleTransformer)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def logits_of(model: NextScaleTransformer, text: Tensor, codes: Tensor) -> list[Tensor]:
    return [hidden @ weight.T for hidden, weight in model.hidden_and_head_weights(text, codes)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_cached_logits_equal_the_full_pass_and_training_those_of_inference(
    layout: Layout, shape: dict[str, object]
) -> None:
    model = built(layout, **shape)
    text, codes = batch(layout)
    training = logits_of(model, text, codes)
    with torch.no_grad():
        expected = logits_of(model, text, codes)
        for one, other in zip(training, expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
        cache, below = model.new_cache(len(text)), None
        model.read_text(text, cache)
        for level, codes_Bn in enumerate(codes.split([own.positions for own in layout.levels], dim=1)):
            found = model.level_logits(model.read_level(level, below, cache), level)
            torch.testing.assert_close(found, expected[1 + level], atol=1e-4, rtol=1e-4)
            below = model.with_level(below, codes_Bn, level)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_a_code_is_predicted_from_text_and_coarser_levels_alone_and_text_from_no_code(
    layout: Layout, grad: bool, positions: str
) -> None:
    model = built(layout, positions=positions)
    text, codes = batch(layout)
    with torch.set_grad_enabled(grad):
        before = logits_of(model, text, codes)
        for index in range(layout.image_length):
            own = layout.level_at(index)
            changed = codes.clone()
            changed[:, index] = (changed[:, index] + 1) % layout.levels[own].codebook_size
            for part, (one, other) in enumerate(zip(before, logits_of(model, text, changed), strict=True)):
                moved = (one - other).abs().amax(-1) > 0
                assert moved.all() if part - 1 > own else not moved.any()
        after = logits_of(model, text.flip(0), codes)
    assert ((before[1] - after[1]).abs().amax(-1) > 0)[0].all()


def test_coarse_codes_lie_amid_the_fine_ones_that_they_describe() -> None:
    layout = Layout.of(1, 20, [(2, 2, 8), (4, 4, 8)])
    model = built(layout)
    below = [model.with_level(None, codes, 0) for codes in torch.tensor([[[0, 0, 0, 0]], [[0, 0, 0, 1]]])]
    moved = (below[0] - below[1]).square().sum(-1)[0]
    quarters = moved.view(2, 2, 2, 2).sum(dim=(1, 3))
    assert quarters[1, 1] > 0.5 * moved.sum()


def test_training_learns_codes_by_heart_and_reads_other_codes_than_it_predicts() -> None:
    layout = LAYOUTS[0]
    config = TransformerConfig.model_validate(
        {"layers": 2, "width": 32, "heads": 4, "order": "scale", "style": "modern", "caption_dropout": 0.0}
    )
    torch.manual_seed(0)
    objective = JointObjective(build_transformer(layout, config), config)
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
        noisy = [objective.train()(learned, 0)[1]["loss/image"] for _ in range(2)]
        again = objective.eval()(learned, 0)[1]
    assert metrics["bits/image_token"] < 2  # 3 untrained
    assert metrics["loss/position"].shape == (layout.length,)
    assert all(parameter.grad is not None for parameter in objective.parameters())
    assert noisy[0] != noisy[1]  # two draws of the codes that are read
    assert again["loss/image"] == metrics["loss/image"]


def test_code_noise_replaces_a_share_of_each_sample_that_is_its_own_by_codes_of_the_level() -> None:
    layout = Layout.of(1, 20, [(10, 10, 4), (20, 20, 64)])
    codes = torch.zeros(400, 500, dtype=torch.int64)
    torch.manual_seed(3)
    found = replace_codes(codes, layout, 0.4)
    torch.manual_seed(3)
    assert torch.equal(found, replace_codes(codes, layout, 0.4))  # what a resumed training draws
    assert found[:, :100].max() == 3
    assert found[:, 100:].max() == 63
    shares = (found[:, 100:] > 0).float().mean(1) * 64 / 63
    assert shares.min() < 0.05
    assert 0.35 < shares.max() < 0.47
    assert abs(float(shares.mean()) - 0.2) < 0.02
    assert replace_codes(codes, layout, 0.0) is codes


def test_a_folder_of_order_scale_loads_as_such_and_as_automodel(tmp_path: Path) -> None:
    from transformers import AutoModel

    layout = LAYOUTS[1]
    model = built(layout)
    model.save_pretrained(tmp_path)
    text, codes = batch(layout)
    with torch.no_grad():
        expected = model(text, codes)
        for loaded in (load_transformer(tmp_path), AutoModel.from_pretrained(tmp_path)):
            text_logits, level_logits = loaded(text, codes)
            assert torch.equal(text_logits, expected[0])
            assert all(torch.equal(one, other) for one, other in zip(level_logits, expected[1], strict=True))


def test_settings_that_order_scale_cannot_have_are_refused() -> None:
    with pytest.raises(ValueError, match="order scale needs attention full, found sparse"):
        TransformerShape.model_validate({"order": "scale", "style": "classic"})
    shape = TransformerShape.model_validate({"order": "scale", "width": 32})
    with pytest.raises(UserError, match=r"^transformer.order scale: expected .* of several levels .*, found one level"):
        build_transformer(Layout.of(3, 20, [(4, 4, 8)]), shape)
