"""Promises of muP (`base_width`): a learning rate found at one width holds at another."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline.config.transformer import TransformerConfig
from pipeline.training.optimizer import build_adamw
from pipeline.transformer.build import build_transformer
from pipeline.transformer.model import Transformer
from pipeline.transformer.objective import JointObjective
from tests.transformer.test_model import LAYOUTS, batch


def logits(model: Transformer, values: dict[str, Tensor]) -> list[Tensor]:
    """Of images: for each level, or each digit of its codes."""
    factors = model.hidden_and_head_weights(values["text"], values["codes"])[1:]
    return [(hidden @ weight.T).detach() for hidden, weight in factors]


def step_sizes(width: int, base_width: int | None, code_groups: int = 1) -> list[float]:
    """How far four Adam steps move the logits of a model that predicts nothing yet (rms over positions)."""
    layout = LAYOUTS[0]
    shape = {"layers": 2, "width": width, "heads": width // 16, "base_width": base_width, "code_groups": code_groups}
    training = {"steps": 4, "batch_size": 8, "learning_rate": 1e-2, "warmup_steps": 0}
    config = TransformerConfig.model_validate({**shape, "training": training})
    torch.manual_seed(0)
    model = build_transformer(layout, config)
    objective = JointObjective(model, config).train()
    optimizer = build_adamw(objective.parameter_groups(), config.training)
    values = dict(zip(("text", "codes"), batch(layout, 8), strict=True))
    before = logits(model, values)
    for step in range(4):
        objective(values, step)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    after = logits(model, values)
    return [float((one - other).square().mean().sqrt()) for one, other in zip(after, before, strict=True)]


@pytest.mark.parametrize("code_groups", [1, 2])
def test_with_base_width_a_learning_rate_moves_every_width_as_far(code_groups: int) -> None:
    small, large = step_sizes(32, 32, code_groups), step_sizes(512, 32, code_groups)
    assert all(0.6 < wide / narrow < 1.6 for wide, narrow in zip(large, small, strict=True))
    assert step_sizes(512, None, code_groups)[0] / small[0] > 2.5  # without it the same rate grows with the width


def test_base_width_changes_no_number_at_the_base_itself() -> None:
    objectives = []
    for base in (None, 32):
        torch.manual_seed(0)
        config = TransformerConfig(layers=1, width=32, heads=2, base_width=base)
        objectives.append(JointObjective(Transformer(LAYOUTS[0], config), config))
    for one, other in zip(objectives[0].parameters(), objectives[1].parameters(), strict=True):
        assert torch.equal(one, other)
    groups = build_adamw(objectives[1].parameter_groups(), config.training).param_groups
    assert {group["lr"] for group in groups} == {config.training.learning_rate}


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_matrices_in_blocks_and_the_head_learn_at_the_rate_of_their_width_and_all_else_at_the_configs(
    positions: str,
) -> None:
    config = TransformerConfig.model_validate({"width": 64, "base_width": 32, "positions": positions})
    objective = JointObjective(Transformer(LAYOUTS[1], config), config)
    plain, scaled = objective.parameter_groups()
    assert (plain.learning_rate_scale, scaled.learning_rate_scale) == (1.0, 0.5)
    names = {id(parameter): name for name, parameter in objective.named_parameters()}
    found = {names[id(parameter)] for parameter in scaled.parameters}
    matrices = {name for name, p in objective.named_parameters() if ".blocks." in name and p.ndim == 2}
    assert found == matrices | {"transformer.head.weight"}
    assert len(matrices) == 4 * config.layers
    together = [id(parameter) for group in (plain, scaled) for parameter in group.parameters]
    assert sorted(together) == sorted(names)  # each once
    for group in (plain, scaled):  # in the module's order, which the optimizer's states are saved in
        own = {id(parameter) for parameter in group.parameters}
        assert [id(parameter) for parameter in group.parameters] == [key for key in names if key in own]


def test_without_base_width_all_parameters_are_one_group() -> None:
    config = TransformerConfig()
    objective = JointObjective(Transformer(LAYOUTS[0], config), config)
    (group,) = objective.parameter_groups()
    assert group.learning_rate_scale == 1.0
    assert [id(p) for p in group.parameters] == [id(p) for p in objective.parameters()]
    assert objective.blocks() == list(objective.transformer.blocks)


def loss_after_training(width: int, base_width: int | None, learning_rate: float, steps: int = 24) -> float:
    """Mean image loss of the last four steps on 32 samples that are to be learnt by heart."""
    layout = LAYOUTS[1]
    shape = {"layers": 2, "width": width, "heads": width // 16, "base_width": base_width, "caption_dropout": 0.0}
    training = {"steps": steps, "batch_size": 32, "learning_rate": learning_rate, "warmup_steps": 0}
    config = TransformerConfig.model_validate({**shape, "training": training})
    torch.manual_seed(0)
    objective = JointObjective(Transformer(layout, config), config).train()
    optimizer = build_adamw(objective.parameter_groups(), config.training)
    values = dict(zip(("text", "codes"), batch(layout, 32), strict=True))
    losses = []
    for step in range(steps):
        loss, metrics = objective(values, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(metrics["loss/image"]))
    return sum(losses[-4:]) / 4


@pytest.mark.slow
def test_with_base_width_the_best_learning_rate_stays_and_without_it_moves() -> None:
    rates = [2.0**-5, 2.0**-7, 2.0**-9]

    def best(width: int, base_width: int | None) -> float:
        return min(rates, key=lambda rate: loss_after_training(width, base_width, rate))

    assert best(32, 32) == best(128, 32) == 2.0**-7
    assert best(128, None) == 2.0**-9
