"""What large codebooks cost the transformer, and what reading and predicting their codes by digits does to that.

    python -m benchmarks.bit_groups cost --rounds 5              CPU time of a training step, all by turns in one run
    python -m benchmarks.bit_groups bits DIR --steps 400         bits an image: one head beside two digits, 2**12 codes

DIR holds train/ and val/ as for benchmarks/tokenizers.py. The codes of `bits` are those of a binary tokenizer that is
trained first, as many steps; both transformers see the same batches. One thread, 4 layers of 256.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
from torch import Tensor

from benchmarks.contestants import Ours
from benchmarks.tokenizers import BINARY, splits, vqvae
from pipeline.config.training import TrainingConfig
from pipeline.config.transformer import TransformerConfig
from pipeline.core.arithmetic import cpu_has_bf16
from pipeline.core.objective import Objective
from pipeline.training.optimizer import build_adamw, set_learning_rates
from pipeline.training.schedule import learning_rate_factor
from pipeline.transformer.build import build_transformer
from pipeline.transformer.layout import Layout
from pipeline.transformer.objective import JointObjective

SHAPE: dict[str, Any] = {"layers": 4, "width": 256, "heads": 4, "style": "modern", "caption_dropout": 0}
BATCH = 16
_CASES = ((10, 1), (13, 1), (16, 1), (13, 2), (16, 2), (18, 2), (18, 3))  # bits of a code, digits


def objective_of(side: int, bits: int, groups: int) -> JointObjective:
    torch.manual_seed(0)
    config = TransformerConfig.model_validate(SHAPE | {"code_groups": groups})
    return JointObjective(build_transformer(Layout.of(1, 2, [(side, side, 2**bits)]), config), config).train()


def updates(objective: Objective, training: TrainingConfig) -> Callable[[dict[str, Tensor], int], None]:
    """A training step of a batch."""
    optimizer = build_adamw(objective.parameter_groups(), training)

    def update(batch: dict[str, Tensor], step: int) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=cpu_has_bf16()):
            loss, _ = objective(batch, step)
        loss.backward()
        set_learning_rates(optimizer, learning_rate_factor(training, step))
        torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        objective.after_update(True)

    return update


@click.group()
def main() -> None:
    """See the module's docstring."""
    torch.set_num_threads(1)


@main.command()
@click.option("--rounds", default=5, show_default=True)
@click.option("--side", default=8, show_default=True, help="of the grid of codes")
def cost(rounds: int, side: int) -> None:
    """A step with one head and with digits."""
    cases: dict[tuple[int, int], list[float]] = {case: [] for case in _CASES}
    training = TrainingConfig(steps=100, batch_size=BATCH, warmup_steps=1)
    steps = {case: updates(objective_of(side, *case), training) for case in cases}
    text = torch.zeros(BATCH, 1, dtype=torch.int64)
    for turn in range(rounds + 1):
        for (bits, groups), times in cases.items():
            batch = {"text": text, "codes": torch.randint(2**bits, (BATCH, side**2))}
            begin = time.process_time()
            steps[bits, groups](batch, 10)
            if turn:  # the first one warms up
                times.append(time.process_time() - begin)
    base = median(cases[10, 1])
    click.echo("| codes | digits | step, ms CPU | beside 2**10 |\n|---|---|---|---|")
    for (bits, groups), times in cases.items():
        click.echo(f"| 2**{bits} | {groups} | {1000 * median(times):,.0f} | {median(times) / base:.2f} |")


@main.command()
@click.argument("data", type=click.Path(path_type=Path))
@click.option("--steps", default=400, show_default=True)
@click.option("--bits", "code_bits", default=12, show_default=True)
def bits(data: Path, steps: int, code_bits: int) -> None:
    """What both say of the validation images."""
    train, validation = splits(data, Path("tokenizers.images.pt"))
    made = Ours(vqvae(**BINARY | {"bits": code_bits}))
    training = TrainingConfig(steps=steps, batch_size=BATCH, learning_rate=4e-3, weight_decay=0, warmup_steps=40)
    update = updates(made.objective, training)
    for step, batch in enumerate(_batches(train, steps)):
        update({"images": batch}, step)
    made.module.eval()
    codes = [torch.cat([made.encode(part / 255)[0] for part in images.split(64)]) for images in (train, validation)]
    click.echo(f"codes in use on the validation split: {len(codes[1].unique()):,} of {2**code_bits:,}")
    click.echo("| digits | bits an image | bits a code |\n|---|---|---|")
    for groups in (1, 2, 3):
        objective = objective_of(8, code_bits, groups)
        update = updates(objective, TrainingConfig(steps=steps, batch_size=BATCH, learning_rate=1e-3, warmup_steps=40))
        for step, batch in enumerate(_batches(codes[0], steps)):
            update({"text": torch.zeros(len(batch), 1, dtype=torch.int64), "codes": batch}, step)
        found = _bits_a_code(objective.eval(), codes[1])
        click.echo(f"| {groups} | {found * codes[1].shape[1]:.1f} | {found:.3f} |")


def _batches(samples: Tensor, steps: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [samples[torch.randint(len(samples), (BATCH,), generator=generator)] for _ in range(steps)]


@torch.no_grad()
def _bits_a_code(objective: JointObjective, codes: Tensor) -> float:
    found = 0.0
    for part in codes.split(64):
        _, metrics = objective({"text": torch.zeros(len(part), 1, dtype=torch.int64), "codes": part}, 0)
        found += metrics["bits/image_token"].item() * len(part) / len(codes)
    return found


if __name__ == "__main__":
    main()
