"""A model that is built without memory starts with values that the seed and each parameter's name give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

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
def test_every_shape_of_the_transformer_gets_values_spread_as_by_its_constructor(fields: dict[str, Any]) -> None:
    expected = dict(_build(fields).named_parameters())
    with initial_values(5) as initial:
        model = _build(fields)
    assert {p.untyped_storage().nbytes() for p in model.parameters() if p.ndim > 1} == {4}
    assert [p.shape for p in model.parameters()] == [p.shape for p in expected.values()]
    for parameter, values in initial.draw(model):
        parameter.data = values
    for name, parameter in model.named_parameters():
        if expected[name].unique().numel() == 1:
            assert torch.equal(parameter, expected[name]), name
        else:
            error = 4 / (2 * parameter.numel()) ** 0.5  # four standard errors of a standard deviation
            assert parameter.std().item() == pytest.approx(expected[name].std().item(), rel=2 * error), name
            assert abs(parameter.mean().item()) < 4 * parameter.std().item() / parameter.numel() ** 0.5, name


class _Layers(nn.Module):
    """Linear layers, made in the order that is given."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(4, 4))


def _values(seed: int, *names: str) -> dict[str, Tensor]:
    with initial_values(seed) as initial:
        model = _Layers(*names)
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    return {name_of[id(parameter)]: values for parameter, values in initial.draw(model)}


def test_values_are_a_function_of_the_seed_and_the_name_whatever_else_the_model_has() -> None:
    values, others = _values(5, "a", "b"), _values(5, "c", "b", "d", "a")
    assert sorted(values) == ["a.bias", "a.weight", "b.bias", "b.weight"]
    assert all(torch.equal(value, others[name]) for name, value in values.items())
    assert not torch.equal(values["a.weight"], values["b.weight"])
    assert not torch.equal(values["a.weight"], _values(6, "a")["a.weight"])


def test_drawing_leaves_the_generator_of_torch_where_it_was() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    _values(5, "a")
    assert torch.equal(torch.rand(3), expected)


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
    drawn = [(id(parameter), values) for parameter, values in initial.draw(model)]
    assert sorted(number for number, _ in drawn) == sorted(id(p) for p in model.parameters())
    assert {values.sum().item() for number, values in drawn if number == id(model.scale)} == {6.0}
    assert {values.abs().sum().item() for number, values in drawn if number == id(model.layer.weight)} == {0.0}


def test_values_that_cannot_be_drawn_again_are_an_error() -> None:
    with initial_values(0) as initial:
        model = nn.ParameterList([nn.Parameter(torch.randn(2, 2))])
    with pytest.raises(RuntimeError, match="does not write 0"):
        list(initial.draw(model))
    assert len(model) == 1
    with initial_values(0), torch.no_grad(), pytest.raises(RuntimeError, match="found exponential_"):
        nn.Linear(2, 2).weight.exponential_()


def test_no_two_parameters_are_there_at_a_time_for_who_lets_each_go() -> None:
    with initial_values(0) as initial:
        model = _build({})
    with LiveBytes() as live:
        for _, values in initial.draw(model):
            del values
    assert live.peak == 4 * max(parameter.numel() for parameter in model.parameters())
    assert live.now == 0
