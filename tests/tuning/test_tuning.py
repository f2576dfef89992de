"""Preference tuning: the loss is the paper's, drawn images are functions of their numbers, and rewards rise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import Tensor

from pipeline.cli.plan import plan
from pipeline.config.base import parse_config
from pipeline.config.pipeline import load_pipeline
from pipeline.config.text_tokenizer import TextTokenizerConfig
from pipeline.config.transformer import TransformerConfig
from pipeline.config.tune import TuneConfig
from pipeline.core.errors import UserError
from pipeline.core.initial_values import has_values, initial_values
from pipeline.shapes.drawing import draw
from pipeline.shapes.world import sample
from pipeline.text_tokenizer import TextTokenizer
from pipeline.transformer.build import build_transformer
from pipeline.transformer.layout import Layout
from pipeline.transformer.model import Transformer
from pipeline.tuning.objective import GroupRelativeObjective, advantages, log_probabilities
from pipeline.tuning.rewards import reward_of
from pipeline.tuning.rollouts import Rollouts
from tests.conftest import TINY

LAYOUT = Layout.of(2, 6, [(2, 2, 8), (2, 4, 8)])
SMALL: dict[str, Any] = {"layers": 2, "width": 16, "heads": 2, "dropout": 0.3}


def model(seed: int = 0, **shape: Any) -> Transformer:
    torch.manual_seed(seed)
    built = build_transformer(LAYOUT, parse_config(TransformerConfig, SMALL | shape, "test"))
    torch.nn.init.normal_(built.head.weight, std=0.5)
    return built.eval()


def drawn(rows: int = 6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "text": torch.randint(0, 6, (rows, 2), generator=generator),
        "codes": torch.randint(0, 8, (rows, 12), generator=generator),
        "advantage": torch.randn(rows, generator=generator),
        "reward": torch.rand(rows, generator=generator),
    }


def as_gray(codes_BN: Tensor) -> list[Image.Image]:
    """An image of the mean of its codes."""
    return [Image.new("RGB", (4, 4), (int(value * 30),) * 3) for value in codes_BN.double().mean(dim=1).tolist()]


def brightness(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    return [float(np.asarray(image).mean()) for image in images]


def test_an_advantage_is_the_reward_over_its_groups_mean_in_deviations() -> None:
    rewards = torch.tensor([[0.0, 1.0, 1.0, 0.0], [2.0, 2.0, 2.0, 2.0], [1.0, 2.0, 3.0, 6.0]])
    found = advantages(rewards)
    group = np.array([1.0, 2.0, 3.0, 6.0])
    assert found[2].numpy() == pytest.approx((group - group.mean()) / group.std(ddof=1), rel=1e-6)
    assert found[1].tolist() == [0, 0, 0, 0]
    assert found[0].tolist() == pytest.approx([-0.8660254, 0.8660254, 0.8660254, -0.8660254])


@pytest.mark.parametrize("shape", [{}, {"order": "scale"}, {"code_groups": 2}])
def test_log_probabilities_are_those_that_codes_are_drawn_by(shape: dict[str, Any]) -> None:
    policy = model(**shape)
    rollouts = Rollouts(policy, policy, as_gray, brightness, TuneConfig(temperature=0.7), "fp32", seed=0)
    text = torch.tensor([[3, 1]]).repeat(1500, 1)
    with torch.no_grad():
        codes = rollouts.codes(text, [(0, j) for j in range(len(text))])
        exact = log_probabilities(policy, text, codes, 0.7)
        first = exact[:, [0, 4] if "code_groups" in shape else [0]].sum(dim=1).exp()  # its digits: four codes apart
    for code in range(8):  # how often each is drawn as the first one, and what its probability says
        if (chosen := codes[:, 0] == code).any():
            assert chosen.double().mean().item() == pytest.approx(first[chosen][0].item(), abs=0.04)


def test_the_loss_is_minus_the_advantage_with_the_papers_divergence() -> None:
    policy, start, batch = model(0), model(1), drawn()
    own = log_probabilities(policy, batch["text"], batch["codes"])
    with torch.no_grad():
        other = log_probabilities(start, batch["text"], batch["codes"])
    weights = batch["advantage"][:, None]
    apart = (other - own).double()
    expected = -(weights * own).mean() + 0.5 * (apart.exp() - apart - 1).mean()  # of which the gradient counts
    wanted = torch.autograd.grad(expected, list(policy.parameters()), allow_unused=True)
    objective = GroupRelativeObjective(policy, kl_weight=0.5, temperature=1.0).train()
    loss, metrics = objective(batch | {"start": other}, 0)
    found = torch.autograd.grad(loss, list(policy.parameters()), allow_unused=True)
    for one, two in zip(found, wanted, strict=True):
        assert (one is None) == (two is None)
        if one is not None and two is not None:
            assert torch.allclose(one, two.to(one), atol=1e-6)
    assert metrics["kl"].item() == pytest.approx((apart.exp() - apart - 1).mean().item(), rel=1e-5)
    assert metrics["reward"].item() == pytest.approx(batch["reward"].mean().item())


def test_the_model_learns_as_it_draws_without_dropout() -> None:
    policy, batch = model(), drawn()
    batch["start"] = torch.zeros(6, 12)
    objective = GroupRelativeObjective(policy, 0.1, 1.0).train()
    assert objective(batch, 0)[0].item() == objective(batch, 0)[0].item()


@pytest.mark.slow
@pytest.mark.parametrize("shape", [{}, {"order": "scale"}])
def test_rewards_rise_and_the_leash_holds(shape: dict[str, Any]) -> None:
    ends = {}
    for kl_weight in (0.0, 5.0):
        policy, start = model(**shape), model(**shape)
        config = TuneConfig(group_size=16, kl_weight=kl_weight)
        rollouts = Rollouts(policy, start, as_gray, brightness, config, "fp32", seed=0)
        objective = GroupRelativeObjective(policy, kl_weight, 1.0).train()
        optimizer, rewards, text = torch.optim.Adam(policy.parameters(), 0.02), [], torch.tensor([[3, 1], [2, 0]])
        for step in range(12):
            batch = rollouts.draw(text, ["a", "b"], first=2 * step)
            loss, metrics = objective(batch, step)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rewards.append(metrics["reward"].item())
        ends[kl_weight] = float(np.mean(rewards[-3:])) - rewards[0], metrics["kl"].item()
    assert ends[0.0][0] > 20  # of 210 that are possible
    assert ends[5.0][1] < 0.5 * ends[0.0][1]


def test_an_image_is_a_function_of_its_prompts_position_and_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, text = model(), torch.tensor([[3, 1], [2, 0]])
    rollouts = Rollouts(policy, policy, as_gray, brightness, TuneConfig(group_size=4), "fp32", seed=5)
    both = rollouts.draw(text, ["a", "b"], first=7)
    second = rollouts.draw(text[1:], ["b"], first=8)
    assert both["codes"][4:].tolist() == second["codes"].tolist()
    assert both["codes"][:4].tolist() != rollouts.draw(text[:1], ["a"], first=8)["codes"].tolist()
    in_parts = Rollouts(policy, policy, as_gray, brightness, TuneConfig(group_size=4, draw_at_once=3), "fp32", seed=5)
    assert in_parts.draw(text, ["a", "b"], first=7)["codes"].tolist() == both["codes"].tolist()
    assert {name: value.shape for name, value in rollouts.blank(2).items()} == {n: v.shape for n, v in both.items()}


def test_the_judge_rewards_an_image_that_shows_its_prompt_and_no_other() -> None:
    text = TextTokenizer.train(["a red star"], TextTokenizerConfig())
    reward = reward_of(TuneConfig(reward="judge"), text, None)
    captions, scenes = zip(*(sample(0, number) for number in range(8)), strict=True)
    images = [draw(scene, 64) for scene in scenes]
    assert reward(images, captions) == [1.0] * 8
    assert sum(reward(images[1:] + images[:1], captions)) < 4


def test_a_model_without_memory_has_no_values() -> None:
    with initial_values(0):
        empty = build_transformer(LAYOUT, parse_config(TransformerConfig, SMALL, "test"))
    assert not has_values(empty)
    assert has_values(model())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["tune.reward=judge"], "reads images of the source shapes alone, found openmoji"),
        (["tune.reward=reranker"], "set reranker.enabled=true"),
        (["tune.reward=clip"], "tune.clip goes with reward clip"),
        (
            ["tune.reward=clip", "tune.clip=x", "tune.training={steps: 20, batch_size: 24, warmup_steps: 0}"],
            "multiple of group_size 16, found 24",
        ),
        (["tune.reward=clip", "tune.clip=x", "transformer.order=any"], "raster or scale"),
        (["tune.reward=clip", "tune.clip=x", "tune.deepspeed.zero_stage=3"], "expected 0, 1 or 2"),
    ],
)
def test_what_cannot_be_tuned_is_refused_in_a_line(given: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_pipeline(TINY, ["tune.enabled=true", *given])


def test_plan_counts_what_tuning_takes() -> None:
    given = [str(TINY), "--gpus", "1", "tune.enabled=true", "tune.reward=clip", "tune.clip=x"]
    assert "200 steps of 128 images, 16 of each prompt: 7.61e+11 FLOPs" in CliRunner().invoke(plan, given).output
    assert "tune " not in CliRunner().invoke(plan, given[:3]).output
