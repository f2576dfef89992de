"""`transformer.init_from`: a transformer starts with another one's weights, and says which of them do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.config.transformer import TransformerShape
from pipeline.core.errors import UserError
from pipeline.core.initial_values import initial_values
from pipeline.transformer.build import build_transformer
from pipeline.transformer.layout import Layout
from pipeline.transformer.model import Transformer
from pipeline.transformer.start import OtherWeights

SHAPE: dict[str, Any] = {"layers": 2, "width": 16, "heads": 2}
LAYOUT = Layout.of(4, 10, [(4, 4, 8)])
TOKENS = {f"t{number}": number for number in range(10)}


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A folder with a transformer none of whose weights are zero."""
    torch.manual_seed(5)
    model = build_transformer(LAYOUT, TransformerShape(**SHAPE))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(tmp_path / "other")
    return tmp_path / "other"


def _start(
    folder: Path, layout: Layout = LAYOUT, ours: dict[str, int] | None = TOKENS, **shape: Any
) -> tuple[dict[str, Tensor], OtherWeights]:
    """The values by name with which a transformer starts, and how the other one's weights fit."""
    with initial_values(0) as initial:
        model = build_transformer(layout, TransformerShape(**SHAPE | shape))
    weights = OtherWeights(model, folder, ours, TOKENS if ours else None)
    initial.replace(weights.values)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)]: values.clone() for parameter, values in initial.draw(model)}, weights


def _theirs(folder: Path) -> dict[str, Tensor]:
    return Transformer.from_pretrained(folder).state_dict()


def test_of_the_same_shape_every_value_is_the_other_models(other: Path) -> None:
    values, weights = _start(other)
    theirs = _theirs(other)
    assert values.keys() == theirs.keys()
    assert all(torch.equal(values[name], theirs[name]) for name in theirs)
    assert (weights.fit.taken, weights.fit.fresh, weights.fit.changed) == (len(theirs), [], [])


def test_rows_of_text_are_taken_by_token_and_those_of_codes_and_start_by_their_place(other: Path) -> None:
    ours = {"new": 1, "t3": 0, "t9": 2}
    values, weights = _start(other, Layout.of(4, 3, [(4, 4, 8)]), ours)
    theirs, fresh = _theirs(other), _start(other, Layout.of(4, 3, [(4, 4, 8)]), ours)[0]
    for name in ("embedding.weight", "head.weight"):
        assert torch.equal(values[name][[0, 2]], theirs[name][[3, 9]])
        assert torch.equal(values[name][3:11], theirs[name][10:18])
    assert torch.equal(values["embedding.weight"][11:], theirs["embedding.weight"][18:])
    assert torch.equal(values["embedding.weight"][1], fresh["embedding.weight"][1])
    assert not torch.equal(values["embedding.weight"][1], theirs["embedding.weight"][1])
    assert "head.weight: 10 of 11 rows; the others begin fresh" in weights.fit.changed


def test_larger_images_and_longer_text_get_interpolated_tables_and_the_last_position_again(other: Path) -> None:
    values, weights = _start(other, Layout.of(6, 10, [(8, 8, 8)]))
    theirs = _theirs(other)
    rows = theirs["rows.0"]
    assert values["rows.0"].shape == (8, 16)
    assert torch.allclose(values["rows.0"][1], 0.75 * rows[0] + 0.25 * rows[1], atol=1e-6)
    assert torch.equal(values["text_position.weight"][:5], theirs["text_position.weight"])
    assert torch.equal(values["text_position.weight"][6], theirs["text_position.weight"][4])
    assert torch.equal(values["embedding.weight"][18 + 5], theirs["embedding.weight"][18 + 3])  # the pads
    assert torch.equal(values["embedding.weight"][-1], theirs["embedding.weight"][-1])  # the start
    assert weights.fit.fresh == []
    assert "rows.0: 4 positions to 8, interpolated" in weights.fit.changed


def test_what_does_not_fit_begins_fresh_and_is_listed(other: Path) -> None:
    values, weights = _start(other, Layout.of(4, 10, [(4, 4, 32)]), layers=3, mlp_width=32)
    fresh = [line.partition(":")[0] for line in weights.fit.fresh]
    assert "blocks.2.attention.out.weight" in fresh
    assert "blocks.0.mlp.out.weight" in fresh
    assert torch.equal(values["blocks.1.attention.out.weight"], _theirs(other)["blocks.1.attention.out.weight"])
    assert "head.weight: 10 of 42 rows; the others begin fresh" in weights.fit.changed
    assert "shape: layers: 2 -> 3" in weights.fit.changed


def test_of_another_width_nothing_fits_which_is_one_line(other: Path) -> None:
    _, weights = _start(other, width=32, qk_norm=False)
    with pytest.raises(UserError, match=r"transformer.init_from: expected a model to start from, found that none"):
        weights.fit.tell("transformer.init_from", other)


def test_without_tokenizers_rows_of_text_are_taken_by_id_and_that_is_told(other: Path) -> None:
    values, weights = _start(other, ours=None)
    assert torch.equal(values["head.weight"], _theirs(other)["head.weight"])
    assert "no text tokenizer near the other model: rows of text are by id" in weights.fit.changed
