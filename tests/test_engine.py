"""Both engines train as plain PyTorch does, on one process and on two, with and without accumulation."""

from pathlib import Path

import pytest
import torch

from pipeline.engine import accumulation_steps
from pipeline.errors import UserError
from pipeline.optim import build_adamw, schedule, set_learning_rates
from pipeline.train_config import TrainingConfig
from tests.engine_worker import BATCH, STEPS, Objective, global_batch, training
from tests.launch import launch


def _plain_pytorch() -> tuple[dict[str, torch.Tensor], list[float]]:
    config = training(1, 1)
    torch.manual_seed(0)
    objective = Objective()
    optimizer = build_adamw(objective, config)
    norms = []
    for step in range(STEPS):
        set_learning_rates(optimizer, schedule(config, step))
        objective(global_batch(step), step)[0].backward()
        norms.append(torch.nn.utils.clip_grad_norm_(objective.parameters(), config.gradient_clipping).item())
        optimizer.step()
        optimizer.zero_grad()
    return objective.state_dict(), norms


@pytest.mark.parametrize(
    ("kind", "zero_stage", "processes", "accumulation"),
    [
        ("accelerate", 0, 1, 2),
        ("accelerate", 0, 2, 1),
        ("accelerate", 0, 2, 2),
        ("deepspeed", 1, 1, 1),
        ("deepspeed", 1, 2, 2),
        ("deepspeed", 2, 2, 1),
    ],
)
def test_an_engine_equals_plain_pytorch(
    kind: str, zero_stage: int, processes: int, accumulation: int, tmp_path: Path
) -> None:
    launch("tests.engine_worker", kind, str(zero_stage), str(accumulation), str(tmp_path), processes=processes)
    found = torch.load(tmp_path / "result.pt")
    weights, norms = _plain_pytorch()
    torch.testing.assert_close(found["weights"], weights, rtol=1e-5, atol=1e-6)
    assert found["norms"] == pytest.approx(norms, rel=1e-4)


def test_a_batch_that_micro_batches_do_not_divide_is_refused() -> None:
    config = TrainingConfig(steps=10, warmup_steps=0, batch_size=12, micro_batch_size=6)
    assert accumulation_steps(config) == 2
    with pytest.raises(UserError, match="found 6: set training.micro_batch_size to a divisor of 4"):
        accumulation_steps(config.model_copy(update={"batch_size": 4}))


def test_fp16_on_cpu_is_refused_with_what_to_do(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("fp16 trains on a GPU")
    from pipeline.engine import build_engine

    config = TrainingConfig(steps=10, warmup_steps=0, batch_size=BATCH, precision="fp16")
    with pytest.raises(UserError, match="found fp16: set training.precision=bf16"):
        build_engine("accelerate", Objective(), config, None, tmp_path)
