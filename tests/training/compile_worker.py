"""Run by tests/training/test_compilation.py: trainings of a small transformer, eager and compiled, on both engines."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from pipeline.config.training import DeepSpeedConfig, TrainingConfig
from pipeline.config.transformer import TransformerConfig
from pipeline.training.checkpoint_files import write_files
from pipeline.training.engines import build_engine
from pipeline.transformer.layout import Layout
from pipeline.transformer.model import Transformer
from pipeline.transformer.objective import JointObjective

STEPS, SAVED_AFTER, BATCH = 3, 1, 4
LAYOUT = Layout.of(4, 30, [(3, 3, 12)])


def built() -> JointObjective:
    """Two layers of two patterns: row and convolution."""
    config = TransformerConfig(style="classic", layers=2, width=32, heads=2, conv_kernel=3, caption_dropout=0.0)
    torch.manual_seed(0)
    objective = JointObjective(Transformer(LAYOUT, config), config)
    for parameter in objective.parameters():  # a head of zeros would hide what is before it
        torch.nn.init.normal_(parameter, std=0.1)
    return objective


def batch(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    text = torch.randint(1, 30, (BATCH, 4), generator=generator)
    return {"text": text, "codes": torch.randint(0, 12, (BATCH, 9), generator=generator)}


def train(kind: Any, zero: int, folder: Path, first: int = 0, **settings: Any) -> dict[str, Any]:
    """Losses of each step and what was compiled. From step `first` on, which an eager training has saved before."""
    training = TrainingConfig(
        steps=STEPS, batch_size=BATCH, warmup_steps=0, learning_rate=1e-2, precision="fp32", **settings
    )
    objective = built()
    names = list(objective.state_dict())
    counters.clear()
    engine = build_engine(kind, objective, training, DeepSpeedConfig(zero_stage=zero), folder)
    if first:
        engine.load(folder)
    losses = []
    for step in range(first, STEPS):
        engine.objective.train()
        losses.append(float(engine.accumulate(batch(step), step, 1.0, True)["loss"]))
        engine.update(1.0)
        if step == SAVED_AFTER and not settings:
            write_files(folder, engine.checkpoint_files())
    with torch.no_grad(), engine.gathered_outside_blocks():  # not compiled: sampling calls blocks position by position
        model, codes = objective.eval().transformer, batch(0)["codes"]
        cache = model.new_cache(BATCH)
        model.read_text(batch(0)["text"], cache)
        for index in range(8):
            model.read_code(codes[:, index], index, cache)
    return {
        "losses": losses,
        "same_names": names == list(objective.state_dict()),
        "graphs": counters["stats"]["unique_graphs"],
        "breaks": sum(counters["graph_break"].values()),
    }


def main() -> None:
    cases, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
    found = {}
    for case in cases:
        torch._dynamo.reset()
        found[json.dumps(case)] = train(folder=folder, **case)
    (folder / "results.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
