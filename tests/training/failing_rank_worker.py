"""The stage transformer, whose rank 1 finds a damaged file at its sixth batch, for test_failing_rank.py."""

from __future__ import annotations

from collections.abc import Generator

import torch.distributed as dist
from torch import Tensor

from pipeline.cli.stage import run_stage
from pipeline.core import distributed
from pipeline.core.errors import UserError
from stages import transformer
from stages.transformer import Workload


class Damaged(Workload):
    def batches(self, consumed: int) -> Generator[dict[str, Tensor], None, None]:
        for number, batch in enumerate(super().batches(consumed)):
            if number == 5 and distributed.rank() == 1:
                raise UserError("train/000007.codes.0.npy is damaged")
            if number == 1:
                print(f"rank {distributed.rank()} waits at most {sorted(_timeouts())} s", flush=True)
            yield batch


def _timeouts() -> list[float]:
    """Seconds, of each process group there is."""
    backends = [group._get_backend(distributed.device()) for group in dist.distributed_c10d._world.pg_map]
    return [backend.options._timeout.total_seconds() for backend in backends]


if __name__ == "__main__":
    transformer.Workload = Damaged  # type: ignore[misc]
    run_stage("transformer", transformer.main)
