"""Run by tests/training/test_no_sync.py: a real training whose steps between two log lines may wait for nothing.

CPU tensors stand for those of a GPU: what would make the host wait for the device raises here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import torch
from PIL import Image
from torch import Tensor, nn

from pipeline.config.training import TrainingConfig
from pipeline.config.transformer import TransformerConfig
from pipeline.core import distributed
from pipeline.core.objective import Objective
from pipeline.data.prefetch import load
from pipeline.image_tokenizer.base import build
from pipeline.orchestration.stage_run import StageRun
from pipeline.orchestration.tracking import Tracker
from pipeline.training.stopping import LookOut
from pipeline.training.trainer import Trainer, train
from pipeline.transformer.layout import Layout
from pipeline.transformer.model import Transformer
from pipeline.transformer.objective import JointObjective
from tests.no_sync import no_sync

STEPS, BATCH, FIRST_STEPS = 8, 8, 2
TOKENIZER = {"kind": "vqvae", "quantizer": {"kind": "ema", "codebook_size": 16, "code_width": 4}, "patch_size": 2}
TOKENIZER |= {"widths": [8], "blocks": 1, "block_kernels": [3, 1]}


class Workload:
    """Random samples of a real objective. See `pipeline.training.workload.Workload`."""

    tokens_per_sample, data_metrics = None, staticmethod(lambda samples: {})

    def __init__(self, kind: str) -> None:
        torch.manual_seed(0)
        self.kind = kind
        self.objective: Objective
        if kind == "transformer":
            config = TransformerConfig(
                layers=2, width=32, heads=2, training=TrainingConfig(steps=200, batch_size=BATCH)
            )
            self.objective = JointObjective(Transformer(Layout.of(4, 20, [(2, 2, 16)]), config), config)
        else:
            self.objective = build(TOKENIZER, 8).objective()

    def batches(self, consumed: int) -> Iterator[dict[str, Tensor]]:
        return load(self._made())

    def _made(self) -> Iterator[dict[str, Tensor]]:
        while True:
            if self.kind == "transformer":
                ids = torch.randint(1, 16, (BATCH, 4))
                yield {"text": ids.to(torch.uint16), "codes": ids.to(torch.uint16)}
            else:
                yield {"images": torch.randint(0, 256, (BATCH, 3, 8, 8), dtype=torch.uint8)}

    def evaluate(self, objective: nn.Module) -> dict[str, float]:
        return {}

    def sample_images(self, objective: nn.Module, in_step: bool) -> dict[str, Image.Image]:
        return {}


def guard(waits: bool) -> None:
    """Let no step but the first ones wait; `waits`: with a step that does, as a training without this promise had."""
    unguarded = Trainer._step

    def step(trainer: Trainer, batch: dict[str, Tensor]) -> None:
        if trainer.state.step < FIRST_STEPS:  # codebooks start, names of metrics are learnt
            unguarded(trainer, batch)
            return
        with no_sync("cpu"):
            unguarded(trainer, batch)
            if waits:
                trainer._running.read()
        print("a step that waited for nothing", flush=True)

    Trainer._step = step  # type: ignore[method-assign]
    LookOut.due = lambda look_out, step: False  # type: ignore[method-assign]


def main(kind: str, folder: str, waits: str = "") -> None:
    guard(bool(waits))
    directory = Path(folder)
    config = TrainingConfig(
        steps=STEPS,
        batch_size=BATCH,
        micro_batch_size=BATCH // 2,
        warmup_steps=2,
        ema_decay=0.9,
        log_every=STEPS,
        evaluate_every=STEPS,
        log_images_every=STEPS,
        checkpoint_every=STEPS,
    )
    run = SimpleNamespace(
        name=kind,
        config=SimpleNamespace(seed=0),
        training_seed=0,
        directory=directory,
        tracker=Tracker(directory, None),
    )
    engine = "deepspeed" if kind == "transformer" else "accelerate"
    train(cast(StageRun, run), config, Workload(kind), engine=engine)  # type: ignore[arg-type]
    distributed.leave(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
