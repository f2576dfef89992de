"""Run by tests/test_engine.py, under one or two processes: ten steps of a small network on an engine."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline import distributed
from pipeline.engine import accumulation_steps, build_engine
from pipeline.optim import schedule
from pipeline.train_config import DeepSpeedConfig, TrainingConfig

STEPS, BATCH, WIDTH = 10, 8, 16


class Objective(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(nn.Linear(WIDTH, 32), nn.LayerNorm(32), nn.GELU())
        self.head = nn.Linear(32, 1)

    def forward(self, batch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        return (self.head(self.blocks(batch["x"])) - batch["x"].sum(1, keepdim=True)).square().mean(), {}


def global_batch(step: int) -> dict[str, Tensor]:
    return {"x": torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(step))}


def training(accumulation: int, processes: int, optimizer: str = "adamw") -> TrainingConfig:
    return TrainingConfig(
        optimizer=optimizer,  # type: ignore[arg-type]
        steps=STEPS,
        batch_size=BATCH,
        micro_batch_size=BATCH // processes // accumulation,
        precision="fp32",
        learning_rate=1e-2,
        warmup_steps=3,
        gradient_clipping=0.5,
        weight_decay=0.1,
    )


def main(kind: str, optimizer: str, zero_stage: str, accumulation: str, output: str) -> None:
    distributed.init()
    config = training(int(accumulation), distributed.world_size(), optimizer)
    torch.manual_seed(0)
    objective = Objective()
    zero = DeepSpeedConfig(zero_stage=int(zero_stage))
    engine = build_engine(kind, objective, config, zero, Path(output))  # type: ignore[arg-type]
    parts, rank, world = accumulation_steps(config), distributed.rank(), distributed.world_size()
    norms = []
    for step in range(STEPS):
        mine = global_batch(step)["x"].chunk(world)[rank]
        for index, micro in enumerate(mine.chunk(parts)):
            engine.accumulate({"x": micro}, step, 1 / parts, last=index == parts - 1)
        norms.append(engine.update(schedule(config, step)).gradient_norm)
    if distributed.is_main():
        torch.save({"weights": objective.state_dict(), "norms": norms}, Path(output) / "result.pt")
    distributed.leave(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
