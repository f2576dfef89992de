"""A model that is built without memory starts with the bits that its constructor would have drawn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pipeline.config.base import parse_config
from pipeline.config.transformer import TransformerConfig
from pipeline.core.initial_values import initial_values
from pipeline.core.level import Level
from pipeline.training.live_memory import LiveBytes
from pipeline.transformer.layout import Layout
from pipeline.transformer.model import Transformer

SHAPES: list[dict[str, Any]] = [{}, {"base_width": 16}, {"style": "classic"}, {"norm": "layernorm", "qk_norm": True}]


def _build(fields: dict[str, Any]) -> Transformer:
    training = {"steps": 2, "batch_size": 2, "warmup_steps": 0}
    shape = {"layers": 2, "width": 32, "heads": 2, "training": training} | fields
    layout = Layout.of(8, 50, [Level(2, 2, 20), Level(4, 4, 30)])
    return Transformer(layout, parse_config(TransformerConfig, shape, "test"))


@pytest.mark.parametrize("fields", SHAPES, ids=str)
def test_every_shape_of_the_transformer_gets_the_bits_of_a_model_with_memory(fields: dict[str, Any]) -> None:
    torch.manual_seed(5)
    expected = dict(_build(fields).named_parameters())
    with initial_values(5) as initial:
        model = _build(fields)
    assert {p.untyped_storage().nbytes() for p in model.parameters() if p.ndim > 1} == {4}
    assert [p.shape for p in model.parameters()] == [p.shape for p in expected.values()]
    for parameter, values in initial.draw():
        parameter.data = values
    assert [name for name, p in model.named_parameters() if not torch.equal(p, expected[name])] == []


def test_vectors_keep_what_their_constructor_gave_them_and_each_parameter_comes_once() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor([1.0, 2.0]))
            self.layer = nn.Linear(2, 2)
            nn.init.zeros_(self.layer.weight)
            with torch.no_grad():
                self.scale.mul_(2)

    with initial_values(0) as initial:
        model = Scaled()
    drawn = [(id(parameter), values) for parameter, values in initial.draw()]
    assert sorted(number for number, _ in drawn) == sorted(id(p) for p in model.parameters())
    assert {values.sum().item() for number, values in drawn if number == id(model.scale)} == {6.0}
    assert {values.abs().sum().item() for number, values in drawn if number == id(model.layer.weight)} == {0.0}


def test_values_that_cannot_be_drawn_again_are_an_error() -> None:
    with initial_values(0) as initial:
        model = nn.ParameterList([nn.Parameter(torch.randn(2, 2))])
    with pytest.raises(RuntimeError, match="found 1 that it does not write"):
        list(initial.draw())
    assert len(model) == 1
    with initial_values(0), torch.no_grad(), pytest.raises(RuntimeError, match="found exponential_"):
        nn.Linear(2, 2).weight.exponential_()


def test_no_two_parameters_are_there_at_a_time_for_who_lets_each_go() -> None:
    with initial_values(0) as initial:
        model = _build({})
    with LiveBytes() as live:
        for _, values in initial.draw():
            del values
    assert live.peak == 4 * max(parameter.numel() for parameter in model.parameters())
    assert live.now == 0
