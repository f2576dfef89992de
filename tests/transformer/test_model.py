"""Promises of pipeline/transformer/."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.config.transformer import TransformerConfig, TransformerShape
from pipeline.core.errors import UserError
from pipeline.transformer.build import build_transformer
from pipeline.transformer.layout import Layout
from pipeline.transformer.model import Transformer
from pipeline.transformer.objective import JointObjective, drop_captions

LAYOUTS = [Layout.of(5, 40, [(3, 4, 16)]), Layout.of(1, 30, [(1, 1, 4), (2, 2, 8), (3, 3, 8), (4, 3, 32)])]


def built(layout: Layout, **shape: object) -> Transformer:
    """Small, with a head that is not zero, so that every logit says something."""
    torch.manual_seed(1)
    values = {"layers": 2, "width": 32, "heads": 4, **shape}
    model = Transformer(layout, TransformerShape.model_validate(values)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def batch(layout: Layout, size: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    text = torch.randint(0, layout.text_vocab_size, (size, layout.text_length), generator=generator)
    text[0, -1:] = 0
    parts = [
        torch.randint(0, level.codebook_size, (size, level.positions), generator=generator) for level in layout.levels
    ]
    return text, torch.cat(parts, dim=1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_offsets_cover_the_vocabulary_without_overlap(layout: Layout) -> None:
    sizes = [layout.text_vocab_size, *(level.codebook_size for level in layout.levels), layout.text_length, 1]
    starts = [0, *layout.level_offsets, layout.pad_offset, layout.start_id]
    assert starts == [sum(sizes[:i]) for i in range(len(sizes))]
    assert layout.vocab_size == sum(sizes)
    assert Layout.from_dict(layout.to_dict()) == layout


SHAPES: list[dict[str, object]] = [
    {"qk_norm": True},
    {"qk_norm": False},
    {"kv_heads": 2},
    {"style": "modern"},
    {"style": "modern", "kv_heads": 1, "attention": "sparse", "conv_kernel": 3, "layers": 3},
    {"style": "classic", "conv_kernel": 3, "layers": 3},  # row, column, convolution
    {"style": "classic", "kv_heads": 2, "conv_kernel": 5, "base_head_width": 4},
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_cached_logits_equal_the_full_pass_at_every_position(layout: Layout, shape: dict[str, object]) -> None:
    model = built(layout, **shape)
    text, codes = batch(layout)
    _, expected = model(text, codes)
    cache = model.new_cache(len(text))
    hidden = model.read_text(text, cache)
    for index in range(layout.image_length):
        level = layout.level_at(index)
        logits = model.level_logits(hidden, level)
        torch.testing.assert_close(logits, expected[level][:, index - layout.level_starts[level]], atol=1e-4, rtol=1e-4)
        if index + 1 < layout.image_length:
            hidden = model.read_code(codes[:, index], index, cache)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_a_prefix_read_at_once_is_one_read_code_by_code(layout: Layout, shape: dict[str, object]) -> None:
    model = built(layout, **shape)
    text, codes = batch(layout)
    _, expected = model(text, codes)
    for first, second in ((1, 2), (3, layout.image_length - 4)):
        cache = model.new_cache(len(text))
        model.read_text(text, cache)
        model.read_codes(codes[:, :first], 0, cache)
        hidden = model.read_codes(codes[:, first : first + second], first, cache)
        index = first + second
        level = layout.level_at(index)
        logits = model.level_logits(hidden, level)
        torch.testing.assert_close(logits, expected[level][:, index - layout.level_starts[level]], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_training_attention_equals_that_of_inference(layout: Layout, shape: dict[str, object]) -> None:
    model = built(layout, **shape)
    text, codes = batch(layout)
    _, training = model(text, codes)
    with torch.no_grad():
        _, inference = model(text, codes)
    for one, other in zip(training, inference, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("style", [None, "modern"])
def test_no_position_sees_later_ones(layout: Layout, grad: bool, style: str | None) -> None:
    model = built(layout, style=style)
    text, codes = batch(layout)
    with torch.set_grad_enabled(grad):
        text_before, before = model(text, codes)
        for index in range(layout.image_length):
            changed = codes.clone()
            changed[:, index] = (changed[:, index] + 1) % layout.levels[layout.level_at(index)].codebook_size
            text_after, after = model(text, changed)
            assert torch.equal(text_before, text_after)
            moved = (torch.cat([(a - b).abs().amax(-1) for a, b in zip(before, after, strict=True)], 1) > 0).any(0)
            assert not moved[: index + 1].any()
            assert moved[index + 1 :].all()


def test_text_positions_do_not_see_later_text_and_code_0_sees_all_of_it() -> None:
    layout = LAYOUTS[0]
    model = built(layout)
    text, codes = batch(layout)
    with torch.no_grad():
        text_before, before = model(text, codes)
        for index in range(layout.text_length):
            changed = text.clone()
            changed[:, index] = (changed[:, index] + 1) % layout.text_vocab_size
            text_after, after = model(changed, codes)
            assert torch.equal(text_before[:, : index + 1], text_after[:, : index + 1])
            assert (before[0][:, 0] - after[0][:, 0]).abs().amax() > 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_part_predicts_its_own_vocabulary_only(layout: Layout) -> None:
    text_logits, logits = built(layout)(*batch(layout))
    assert text_logits.shape[1:] == (layout.text_length, layout.text_vocab_size)
    assert [part.shape[1:] for part in logits] == [(v.positions, v.codebook_size) for v in layout.levels]


def test_each_text_position_has_a_pad_of_its_own() -> None:
    layout = LAYOUTS[0]
    model = built(layout)
    padded = torch.zeros(1, layout.text_length, dtype=torch.int64)
    assert model.text_position is not None
    with torch.no_grad():
        embedded = model._embed_text(padded)[0, 1:]
        expected = model.embedding.weight[layout.pad_offset : layout.start_id] + model.text_position.weight[1:]
    assert torch.equal(embedded, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_equals_a_softmax_over_the_one_vocabulary_with_other_parts_masked(layout: Layout) -> None:
    config = TransformerConfig(layers=2, width=32, heads=4, text_loss_weight=0.25, image_loss_weight=0.5)
    model = built(layout)
    text, codes = batch(layout)
    with torch.no_grad():
        loss, metrics = JointObjective(model, config).eval()({"text": text, "codes": codes}, 0)
    hidden: list[Tensor] = []
    handle = model.norm.register_forward_hook(lambda _module, _inputs, output: hidden.append(output))
    model(text, codes)
    handle.remove()
    text_losses, image_losses = [], []
    for b in range(len(text)):
        for position in range(layout.length):
            scores = (model.head.weight @ hidden[0][b, position]).tolist()
            index = position - layout.text_length
            if index < 0:
                low, high, target = 0, layout.text_vocab_size, int(text[b, position])
            else:
                level = layout.level_at(index)
                low = layout.level_offsets[level]
                high, target = low + layout.levels[level].codebook_size, int(codes[b, index]) + low
            allowed = torch.tensor(scores[low:high])
            (text_losses if index < 0 else image_losses).append(float(allowed.logsumexp(0)) - scores[target])
    text_loss, image_loss = sum(text_losses) / len(text_losses), sum(image_losses) / len(image_losses)
    assert float(metrics["loss/text"]) == pytest.approx(text_loss, rel=1e-4)
    assert float(metrics["loss/image"]) == pytest.approx(image_loss, rel=1e-4)
    assert float(loss) == pytest.approx(0.25 * text_loss + 0.5 * image_loss, rel=1e-4)


@pytest.mark.parametrize("order", ["raster", "any", "scale"])
def test_no_two_gradients_share_their_memory(order: str) -> None:
    """As those of views may: clipping would scale them twice."""
    layout = LAYOUTS[1]  # which has a level of a single code
    config = TransformerConfig.model_validate({"layers": 2, "width": 32, "heads": 4, "order": order})
    model = build_transformer(layout, config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    text, codes = batch(layout)
    JointObjective(model, config)({"text": text, "codes": codes}, 0)[0].backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    before = {name: gradient.clone() for name, gradient in gradients.items()}
    for name, gradient in gradients.items():
        assert torch.equal(gradient, before[name]), name
        gradient.fill_(7)


def test_an_untrained_model_predicts_uniformly() -> None:
    layout = LAYOUTS[0]
    model = Transformer(layout, TransformerShape(layers=1, width=16, heads=2))
    _, metrics = JointObjective(model, TransformerConfig())(dict(zip(("text", "codes"), batch(layout), strict=True)), 0)
    assert float(metrics["loss/image"]) == pytest.approx(float(torch.tensor(16.0).log()), rel=1e-5)


def test_caption_dropout_replaces_whole_captions_by_pads_at_its_rate() -> None:
    text = torch.randint(1, 40, (2000, 5), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    dropped, kept = drop_captions(text, 0.25)
    gone = (dropped == 0).all(1)
    assert kept is not None
    assert torch.equal(kept, ~gone[:, None].expand_as(text))
    assert torch.equal(dropped[~gone], text[~gone])
    assert 0.2 < float(gone.float().mean()) < 0.3
    assert drop_captions(text, 0.0)[0] is text


def test_dropped_captions_are_no_text_to_predict() -> None:
    layout = LAYOUTS[0]
    objective = JointObjective(built(layout), TransformerConfig(caption_dropout=0.5, image_loss_weight=1e-9)).train()
    text, codes = (x.repeat(8, 1) for x in batch(layout))
    torch.manual_seed(0)
    loss, metrics = objective({"text": text, "codes": codes}, 0)
    torch.manual_seed(0)
    kept = drop_captions(text, 0.5)[1]
    assert kept is not None
    assert 0 < int(kept[:, 0].sum()) < len(text)
    whole = JointObjective(objective.transformer, TransformerConfig(caption_dropout=0.0)).train()
    _, of_kept = whole({"text": text[kept[:, 0]], "codes": codes[kept[:, 0]]}, 0)
    expected = 0.125 * of_kept["loss/text"] * kept[:, 0].float().mean() / 0.5  # over what is kept on average
    torch.testing.assert_close(loss.detach(), expected)
    torch.testing.assert_close(0.125 * metrics["loss/text"], expected)


def test_caption_dropout_is_off_in_eval() -> None:
    layout = LAYOUTS[0]
    objective = JointObjective(built(layout), TransformerConfig(caption_dropout=0.9)).eval()
    values = dict(zip(("text", "codes"), batch(layout), strict=True))
    assert torch.equal(objective(values, 0)[0], objective(values, 0)[0])


def test_the_model_learns_codes_by_heart_in_bf16_autocast() -> None:
    layout = LAYOUTS[1]
    torch.manual_seed(0)
    config = TransformerConfig(layers=2, width=64, heads=2, caption_dropout=0.0)
    objective = JointObjective(Transformer(layout, config), config)
    values = dict(zip(("text", "codes"), batch(layout, 4), strict=True))
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    for step in range(120):
        with torch.autocast("cpu", torch.bfloat16):
            loss, metrics = objective(values, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(metrics["loss/image"]) < 0.1


def test_saved_and_loaded_is_the_same(tmp_path: Path) -> None:
    layout = LAYOUTS[1]
    model = built(layout)
    model.save_pretrained(tmp_path)
    loaded = Transformer.from_pretrained(tmp_path)
    assert loaded.layout == layout
    assert not loaded.training
    with torch.no_grad():
        for one, other in zip(model(*batch(layout))[1], loaded(*batch(layout))[1], strict=True):
            assert torch.equal(one, other)


def test_missing_or_foreign_weights_are_a_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected model.safetensors"):
        Transformer.from_pretrained(tmp_path)
    built(LAYOUTS[0]).save_pretrained(tmp_path)
    other = tmp_path / "other"
    built(LAYOUTS[0], layers=1).save_pretrained(other)
    (tmp_path / "config.json").write_bytes((other / "config.json").read_bytes())
    with pytest.raises(UserError, match="does not fit config.json"):
        Transformer.from_pretrained(tmp_path)


def test_label_smoothing_and_z_loss_are_those_of_their_definitions() -> None:
    layout = LAYOUTS[1]
    values = dict(zip(("text", "codes"), batch(layout), strict=True))
    plain = TransformerConfig(caption_dropout=0.0)
    optional = TransformerConfig(caption_dropout=0.0, label_smoothing=0.1, z_loss=0.01)
    model = built(layout)
    loss, metrics = JointObjective(model, optional)(values, 0)
    text_logits, level_logits = model(values["text"], values["codes"])
    targets = [values["text"], *values["codes"].split([level.positions for level in layout.levels], dim=1)]
    expected = 0.0
    for logits, target in zip([text_logits, *level_logits], targets, strict=True):
        smoothed = torch.nn.functional.cross_entropy(logits.mT, target, label_smoothing=0.1, reduction="none")
        part = smoothed + 0.01 * logits.logsumexp(-1) ** 2
        of_image = target is not values["text"]
        share = 0.875 * target.shape[1] / layout.image_length if of_image else 0.125
        expected += share * float(part.detach().mean())
    assert float(loss) == pytest.approx(expected, rel=1e-4)
    _, plain_metrics = JointObjective(model, plain)(values, 0)
    assert float(metrics["loss/image"]) == pytest.approx(float(plain_metrics["loss/image"]), rel=1e-5)
    evaluated, _ = JointObjective(model, optional).eval()(values, 0)
    assert float(evaluated) == pytest.approx(float(JointObjective(model, plain)(values, 0)[0]), rel=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_evaluation_tells_bits_a_token_and_the_loss_of_each_position(layout: Layout) -> None:
    objective = JointObjective(built(layout), TransformerConfig()).eval()
    with torch.no_grad():
        _, metrics = objective(dict(zip(("text", "codes"), batch(layout), strict=True)), 0)
    curve = metrics["loss/position"]
    assert curve.shape == (layout.length,)
    assert float(curve[: layout.text_length].mean()) == pytest.approx(float(metrics["loss/text"]), rel=1e-5)
    assert float(curve[layout.text_length :].mean()) == pytest.approx(float(metrics["loss/image"]), rel=1e-5)
    assert 2 ** float(metrics["bits/image_token"]) == pytest.approx(float(metrics["loss/image"].exp()), rel=1e-4)
