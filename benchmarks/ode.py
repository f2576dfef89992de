"""Continuous-depth blocks against the residual stack of as many parameters: memory, time, quality. A markdown table.

    smalti prepare --config configs/openmoji.yaml
    python benchmarks/ode.py runs/openmoji/prepare

Each variant trains the same tokenizer from the same seed for the same number of steps on the same batches. "kept" is
what autograd keeps of one forward pass for the backward pass, parameters left out: the memory that grows with batches.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from pipeline.config.training import TrainingConfig
from pipeline.core.arithmetic import cpu_has_bf16
from pipeline.data.stream import ImageStream
from pipeline.image_tokenizer.base import build
from pipeline.image_tokenizer.evaluation import evaluate
from pipeline.training.optimizer import build_adamw, set_learning_rates
from pipeline.training.schedule import learning_rate_factor
from pipeline.training.trainer import seed_step

BLOCKS = 3
MODEL: dict[str, Any] = {
    "kind": "vqvae",
    "patch_size": 4,
    "widths": [64],
    "blocks": BLOCKS,
    "block_kernels": [3, 1],
    "bottleneck": 1,
    "stem_kernel": 1,
    "quantizer": {"kind": "fsq", "channels": [8, 5, 5, 5]},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "residual stack": {"block": "residual"},
    "euler": {"solver": "euler"},
    "midpoint": {"solver": "midpoint"},
    "rk4": {"solver": "rk4"},
    "rk4, adjoint": {"solver": "rk4", "adjoint": True},
    "dopri5, tolerance 1e-3": {"solver": "dopri5"},
    "dopri5, adjoint": {"solver": "dopri5", "adjoint": True},
}


@click.command()
@click.argument("prepare", type=click.Path(path_type=Path, exists=True))
@click.option("--steps", default=600, show_default=True)
@click.option("--batch-size", default=16, show_default=True)
@click.option("--only", multiple=True, help="of the variants; default: all")
def main(prepare: Path, steps: int, batch_size: int, only: tuple[str, ...]) -> None:
    row("blocks", "parameters", "kept, MB", "ms per step", "PSNR, dB", "codes used")
    row(*["---"] * 6)
    for name in only or VARIANTS:
        settings = VARIANTS[name]
        block = settings if "block" in settings else {"block": "ode", "ode": settings}
        row(name, *measured(prepare, MODEL | block, steps, batch_size))


def measured(prepare: Path, model: dict[str, Any], steps: int, batch_size: int) -> list[str]:
    stream = ImageStream(prepare, "train", 0)
    torch.manual_seed(0)
    tokenizer = build(model, stream.image_size)
    objective = tokenizer.objective()
    training = TrainingConfig(steps=steps, batch_size=batch_size, learning_rate=3e-3, warmup_steps=steps // 10)
    optimizer = build_adamw(objective.train().parameter_groups(), training)
    batches = stream.batches(0, batch_size)
    kept, started = 0, 0.0
    for step in range(steps):
        if step == 10:  # warm
            started = time.perf_counter()
        seed_step(0, step, 0)
        set_learning_rates(optimizer, learning_rate_factor(training, step))
        memory = Kept(objective)
        with memory, torch.autocast("cpu", torch.bfloat16, enabled=cpu_has_bf16()):
            loss, _ = objective(next(batches), step)
        kept = max(kept, memory.bytes)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()
    seconds = (time.perf_counter() - started) / (steps - 10)
    metrics = evaluate(tokenizer.eval(), validation(prepare)).metrics
    return [
        f"{sum(p.numel() for p in tokenizer.parameters()):,}",
        f"{kept / 1e6:.1f}",
        f"{1000 * seconds:.1f}",
        f"{metrics['psnr']:.2f}",
        f"{100 * metrics['codebook_usage']:.0f} %",
    ]


def validation(prepare: Path) -> Iterator[dict[str, Tensor]]:
    """Each image of the split once."""
    stream = ImageStream(prepare, "val", 0)
    batches = stream.batches(0, 16)
    for start in range(0, len(stream), 16):
        yield {"images": next(batches)["images"][: len(stream) - start]}


class Kept(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes that autograd keeps in the block, each storage once, those of parameters not."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.bytes = 0
        seen = {p.untyped_storage().data_ptr() for p in module.parameters()}

        def count(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                self.bytes += storage.nbytes()
            return tensor

        super().__init__(count, lambda tensor: tensor)


def row(*cells: str) -> None:
    click.echo("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
