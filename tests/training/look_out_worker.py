"""A process of tests/training/test_stopping.py: counts steps of uneven speed, and says at which it looked."""

from __future__ import annotations

import time

import torch

from pipeline.core import distributed
from pipeline.training import stopping
from pipeline.training.engines.base import Update
from pipeline.training.running_metrics import RunningMetrics
from pipeline.training.stopping import LookOut


def main() -> None:
    distributed.init()
    stopping._LOOKS_APART_S = 0.05
    rank, running, look_out = distributed.rank(), RunningMetrics(10), LookOut(every=20)
    looks = []
    for step in range(1, 200):
        time.sleep(0.002 + 0.004 * rank * (step % 7))  # each waits for the other one, but does not do as much
        asked = rank == 1 and step >= 60
        update = Update(gradient_norm=torch.tensor(1.0), applied=torch.tensor(True))
        running.add(step, [{"loss": torch.tensor(1.0)}], update, asked, look_out.step_s)
        if look_out.due(step):
            reading = running.read()
            look_out.looked(step, reading.step_s)
            looks.append(f"{step}{'stop' if reading.asked_to_stop else ''}")
            if reading.asked_to_stop:
                break
    print(f"rank {rank} looks {' '.join(looks)}", flush=True)
    distributed.leave(0)


if __name__ == "__main__":
    main()
