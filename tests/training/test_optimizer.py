"""Learning-rate schedules as functions of the step, and the moving average of weights."""

import pytest
import torch

from pipeline.config.training import TrainingConfig
from pipeline.training.ema import Ema
from pipeline.training.schedule import learning_rate_factor


def _schedule(kind: str, **settings: float) -> list[float]:
    config = TrainingConfig.model_validate(
        {"steps": 100, "batch_size": 1, "warmup_steps": 10, "schedule": kind, **settings}
    )
    return [learning_rate_factor(config, step) for step in range(config.steps)]


@pytest.mark.parametrize("kind", ["cosine", "wsd", "constant"])
def test_every_schedule_warms_up_linearly_to_its_peak(kind: str) -> None:
    assert _schedule(kind)[:11] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.0])


def test_cosine_is_half_way_down_in_the_middle_and_ends_at_its_ratio() -> None:
    factors = _schedule("cosine", final_learning_rate_ratio=0.2)
    assert factors[55] == pytest.approx(0.6)
    assert factors[99] == pytest.approx(0.2, abs=1e-3)
    assert factors[10:] == sorted(factors[10:], reverse=True)


def test_wsd_is_stable_then_decays_over_its_fraction() -> None:
    factors = _schedule("wsd", decay_fraction=0.2)
    assert factors[10:81] == [1.0] * 71
    assert factors[90] == pytest.approx(0.5)
    assert factors[99] == pytest.approx(0.05)


def test_constant_stays() -> None:
    assert set(_schedule("constant")[10:]) == {1.0}


def test_the_average_forgets_the_first_weights_and_is_swapped_in_and_out() -> None:
    weights = {"w": torch.zeros(3)}
    ema = Ema(lambda: weights, decay=0.5)
    weights["w"].fill_(1.0)
    for _ in range(20):
        ema.update()
    assert ema.average["w"].tolist() == pytest.approx([1.0] * 3, abs=1e-4)
    weights["w"].fill_(5.0)
    before = ema.swap_in()
    assert weights["w"].tolist() == pytest.approx([1.0] * 3, abs=1e-4)
    ema.put(before)
    assert weights["w"].tolist() == [5.0] * 3
