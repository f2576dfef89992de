"""Run by tests/training/test_one_gpu_shown.py: the second process of a node, which is shown one GPU, builds an engine.

There is no GPU, so the libraries run on the CPU. They are asked which device they want, where on a GPU they take it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import torch

from pipeline.config.training import DeepSpeedConfig, TrainingConfig
from pipeline.core import distributed
from pipeline.training.engines import AccelerateEngine, build_engine
from tests.training.engine_worker import BATCH, WIDTH, SmallObjective

wanted: set[int] = set()


def take(device: object) -> None:
    """Of all kinds of names that DeepSpeed has for a device: its index."""
    if isinstance(device, str | int) and str(device).isdecimal():
        wanted.add(int(device))


def listen_to_deepspeed() -> None:
    from deepspeed.accelerator import get_accelerator

    kind: Any = type(get_accelerator())
    kind.set_device = lambda self, index: take(index)
    kind.device_name = lambda self, index=None: take(index) or "cpu"


def main(kind: Literal["accelerate", "deepspeed"], directory: Path) -> None:
    distributed.init()
    training = TrainingConfig(steps=2, batch_size=BATCH, warmup_steps=0, precision="fp32")
    let_local_rank_be_the_device = distributed.let_local_rank_be_the_device

    def with_a_gpu() -> None:
        with patch("torch.cuda.is_available", lambda: True), patch("torch.cuda.device_count", lambda: 1):
            let_local_rank_be_the_device()

    with patch.object(distributed, "let_local_rank_be_the_device", with_a_gpu):
        if kind == "deepspeed":
            listen_to_deepspeed()
        engine = build_engine(kind, SmallObjective(), training, DeepSpeedConfig(zero_stage=3), directory)
    for step in range(2):
        engine.accumulate({"x": torch.ones(BATCH, WIDTH)}, step, 1.0, last=True)
        engine.update(1.0)
    if isinstance(engine, AccelerateEngine):
        wanted.add(engine.accelerator.local_process_index)  # what it gives DistributedDataParallel
    print(json.dumps({"wanted": sorted(wanted), "local_rank": distributed.local_rank()}))


if __name__ == "__main__":
    main("accelerate" if sys.argv[1] == "accelerate" else "deepspeed", Path(sys.argv[2]))
