"""A process of tests/training/test_precision.py: says in what it computes where only rank 0's CPU has bf16."""

from __future__ import annotations

from unittest.mock import patch

from pipeline.core import distributed
from pipeline.training.precision import precision_here


def main() -> None:
    distributed.init()
    with patch("torch.ops.mkldnn._is_mkldnn_bf16_supported", distributed.is_main):
        print(f"rank {distributed.rank()} computes in {precision_here('bf16', 'deepspeed')}", flush=True)
    distributed.leave(0)


if __name__ == "__main__":
    main()
