"""Run by test_codebook_over_ranks.py, under one or two processes: a codebook learns from this rank's part."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.config.quantizers import CodebookConfig
from pipeline.config.training import TrainingConfig
from pipeline.core import distributed
from pipeline.image_tokenizer.base import build
from pipeline.image_tokenizer.quantizers.ema import EmaQuantizer
from pipeline.image_tokenizer.quantizers.gumbel import kl_of_mean_to_uniform
from pipeline.training.ema import Ema
from pipeline.training.engines.accelerate import AccelerateEngine
from pipeline.training.trainer import seed_step


def main(output: str) -> None:
    distributed.init()
    rank, world = distributed.rank(), distributed.world_size()
    config = CodebookConfig(kind="ema", codebook_size=16, code_width=4, decay=0.5, dead_code_threshold=0.2)
    states = {f"parts {parts}": learned(config, parts) for parts in (1, 4)}
    logits = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    mine = logits.chunk(world)[rank]
    kl = kl_of_mean_to_uniform(mine.softmax(-1), distributed.mean_with_gradient)
    kl.backward()
    assert logits.grad is not None
    # As DistributedDataParallel does: the mean over ranks of each one's gradient.
    gradient = distributed.sum_tensor(logits.grad) / world
    states["average"] = averaged()
    drawn = {f"dvae parts {parts}": losses(parts) for parts in (1, 4)}
    torch.save(states | drawn | {"kl": kl.detach(), "gradient": gradient}, Path(output) / f"{world}-{rank}.pt")
    distributed.leave(0)


def learned(config: CodebookConfig, parts: int) -> dict[str, Tensor]:
    """A codebook's state after six steps of `parts` micro-batches on each rank."""
    rank, world = distributed.rank(), distributed.world_size()
    torch.manual_seed(rank)  # ranks that begin apart
    made = EmaQuantizer(config, in_width=4, values_per_position=48).train()
    made.project = nn.Identity()  # type: ignore[assignment]
    for step in range(6):
        seed_step(0, step, rank)
        z = torch.randn(8, 20, 4, generator=torch.Generator().manual_seed(step)).chunk(world)[rank]
        for part in z.chunk(parts):
            made(part, step)
        made.after_update(applied=True)
    return made.codebooks[0].state_dict()


def losses(parts: int) -> Tensor:
    """Of a discrete VAE, over all ranks, at three steps of `parts` micro-batches on each."""
    rank, world = distributed.rank(), distributed.world_size()
    torch.manual_seed(0)
    model = {"kind": "dvae", "codebook_size": 16, "code_width": 4, "patch_size": 4, "widths": (8,), "bottleneck": 1}
    objective = build(model, image_size=8).objective().train()
    images = torch.randint(256, (8, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = []
    for step in range(3):
        seed_step(0, step, rank)
        micro_batches = [{"images": part} for part in images.chunk(world)[rank].chunk(parts)]
        if parts > 1:
            objective.look_ahead(micro_batches, step)
        found.append(torch.stack([objective(batch, step)[0].detach() for batch in micro_batches]).mean())
        objective.after_update(applied=True)
    return distributed.mean_tensor(torch.stack(found))


def averaged() -> dict[str, Tensor]:
    """A codebook, its moving average by hand, the engine's, and what the model has once the averages are in it."""
    quantizer = {"kind": "ema", "codebook_size": 16, "code_width": 4, "decay": 0.5}
    model = {"kind": "vqvae", "quantizer": quantizer, "patch_size": 4, "widths": (8,), "bottleneck": 1}
    objective = build(model, image_size=8).objective()
    training = TrainingConfig(steps=9, batch_size=8, warmup_steps=1, precision="fp32")
    engine = AccelerateEngine(objective, training)
    name = "tokenizer.quantizers.0.codebooks.0.embedding"
    book = objective.get_buffer(name)
    ema, by_hand = Ema(engine.local_parameters, decay=0.5), book.clone()
    for step in range(5):
        seed_step(0, step, distributed.rank())
        images = torch.randint(256, (8, 3, 8, 8), dtype=torch.uint8)
        engine.accumulate({"images": images}, step, 1.0, True)
        applied = engine.update(1.0).applied
        objective.after_update(applied)
        ema.update(applied)
        by_hand.lerp_(book, 1 - min(0.5, (2 + step) / (11 + step)))
    found = {"raw": book.clone(), "by hand": by_hand, "average": ema.average[name].clone()}
    ema.swap()
    return found | {"swapped in": book.clone()}


if __name__ == "__main__":
    main(*sys.argv[1:])
