"""Both engines train as plain PyTorch does, on one process and on two, with and without accumulation."""

from pathlib import Path
from typing import Any

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


def _on_the_engine(
    kind: str, optimizer: str, zero_stage: int, accumulation: int, folder: Path, processes: int
) -> dict[str, Any]:
    arguments = (kind, optimizer, str(zero_stage), str(accumulation), str(folder))
    launch("tests.engine_worker", *arguments, processes=processes)
    found: dict[str, Any] = torch.load(folder / "result.pt")
    return found


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
    found = _on_the_engine(kind, "adamw", zero_stage, accumulation, tmp_path, processes)
    weights, norms = _plain_pytorch()
    torch.testing.assert_close(found["weights"], weights, rtol=1e-5, atol=1e-6)
    assert found["norms"] == pytest.approx(norms, rel=1e-4)


def test_muon_on_deepspeed_equals_torchs_muon(tmp_path: Path) -> None:
    config = training(1, 1, "muon")
    torch.manual_seed(0)
    objective = Objective()
    matrix = objective.blocks[0].weight
    others = [parameter for parameter in objective.parameters() if parameter is not matrix]
    assert isinstance(matrix, torch.nn.Parameter)
    muon = torch.optim.Muon([matrix], lr=config.muon_learning_rate, weight_decay=config.weight_decay)
    adamw = torch.optim.AdamW(others, lr=config.learning_rate, betas=config.betas, weight_decay=0.0)
    for step in range(STEPS):
        muon.param_groups[0]["lr"] = config.muon_learning_rate * schedule(config, step)
        adamw.param_groups[0]["lr"] = config.learning_rate * schedule(config, step)
        objective(global_batch(step), step)[0].backward()
        for optimizer in (muon, adamw):
            optimizer.step()
            optimizer.zero_grad()
    found = _on_the_engine("deepspeed", "muon", 1, 1, tmp_path, 1)["weights"]
    # Both orthogonalise in bfloat16, whose rounding depends on the order of operations: 8 bits.
    torch.testing.assert_close(found, objective.state_dict(), rtol=2**-7, atol=2e-3)


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
