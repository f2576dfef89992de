"""Run by test_codebook_over_ranks.py, under one or two processes: a codebook learns from this rank's part."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.config.quantizers import CodebookConfig
from pipeline.core import distributed
from pipeline.image_tokenizer.quantizers.ema import EmaQuantizer
from pipeline.image_tokenizer.quantizers.gumbel import kl_of_mean_to_uniform
from pipeline.training.trainer import seed_step


def main(output: str) -> None:
    distributed.init()
    rank, world = distributed.rank(), distributed.world_size()
    config = CodebookConfig(kind="ema", codebook_size=16, code_width=4, decay=0.5, dead_code_threshold=0.2)
    states = {f"parts {parts}": learned(config, parts) for parts in (1, 4)}
    logits = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    mine = logits.chunk(world)[rank]
    kl = kl_of_mean_to_uniform(mine.softmax(-1))
    kl.backward()
    assert logits.grad is not None
    # As DistributedDataParallel does: the mean over ranks of each one's gradient.
    gradient = distributed.sum_tensor(logits.grad) / world
    torch.save(states | {"kl": kl.detach(), "gradient": gradient}, Path(output) / f"{world}-{rank}.pt")
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


if __name__ == "__main__":
    main(*sys.argv[1:])
