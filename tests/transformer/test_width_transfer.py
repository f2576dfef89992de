"""Promises of muP (`base_width`): a learning rate found at one width holds at another."""

from __future__ import annotations

import torch

from pipeline.config.transformer import TransformerConfig, TransformerShape
from pipeline.training.optimizer import build_adamw
from pipeline.transformer.model import Transformer
from pipeline.transformer.objective import JointObjective
from tests.transformer.test_model import LAYOUTS, batch


def step_sizes(width: int, base_width: int | None) -> float:
    """How far four Adam steps move the residual stream of a model that predicts nothing yet (rms over positions)."""
    layout = LAYOUTS[0]
    shape = TransformerShape(layers=2, width=width, heads=width // 16, base_width=base_width)
    torch.manual_seed(0)
    model = Transformer(layout, shape)
    config = TransformerConfig.model_validate(
        {"training": {"steps": 4, "batch_size": 8, "learning_rate": 1e-2, "warmup_steps": 0}}
    )
    objective = JointObjective(model, config).train()
    optimizer = build_adamw(objective, config.training)
    values = dict(zip(("text", "codes"), batch(layout, 8), strict=True))
    before = model(values["text"], values["codes"])[1][0].detach()
    for step in range(4):
        objective(values, step)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    return float((model(values["text"], values["codes"])[1][0].detach() - before).square().mean().sqrt())


def test_with_base_width_a_learning_rate_moves_every_width_as_far() -> None:
    small, large = step_sizes(32, 32), step_sizes(512, 32)
    assert 0.6 < large / small < 1.6
    assert step_sizes(512, None) / small > 2.5  # without it the same rate grows with the width


def test_base_width_changes_no_number_at_the_base_itself() -> None:
    models = []
    for base in (None, 32):
        torch.manual_seed(0)
        models.append(Transformer(LAYOUTS[0], TransformerShape(layers=1, width=32, heads=2, base_width=base)))
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)
    groups = build_adamw(models[1], TransformerConfig().training).param_groups
    assert {group["lr"] for group in groups} == {TransformerConfig().training.learning_rate}


def loss_after_training(width: int, base_width: int | None, learning_rate: float, steps: int = 24) -> float:
    """Mean image loss of the last four steps on 32 samples that are to be learnt by heart."""
    layout = LAYOUTS[1]
    torch.manual_seed(0)
    model = Transformer(layout, TransformerShape(layers=2, width=width, heads=width // 16, base_width=base_width))
    training = {"steps": steps, "batch_size": 32, "learning_rate": learning_rate, "warmup_steps": 0}
    config = TransformerConfig.model_validate({"caption_dropout": 0.0, "training": training})
    objective = JointObjective(model, config).train()
    optimizer = build_adamw(objective, config.training)
    values = dict(zip(("text", "codes"), batch(layout, 32), strict=True))
    losses = []
    for step in range(steps):
        loss, metrics = objective(values, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(metrics["loss/image"]))
    return sum(losses[-4:]) / 4


def test_with_base_width_the_best_learning_rate_stays_and_without_it_moves() -> None:
    rates = [2.0**-5, 2.0**-7, 2.0**-9]

    def best(width: int, base_width: int | None) -> float:
        return min(rates, key=lambda rate: loss_after_training(width, base_width, rate))

    assert best(32, 32) == best(128, 32) == 2.0**-7
    assert best(128, None) == 2.0**-9
