"""Ranks and collectives, the same in one process, under torchrun and under srun."""

from __future__ import annotations

import logging
import os
import socket
import sys
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")

_TIMEOUT = timedelta(minutes=30)


def rank() -> int:
    """This process's number among all, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Is this rank 0, which writes what is written once?"""
    return rank() == 0


def local_rank() -> int:
    """This process's number among those of its node, from 0."""
    return int(os.environ.get("LOCAL_RANK", 0))


def device() -> torch.device:
    """The GPU of this process, or the CPU."""
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def init(without_launcher: bool = False) -> None:
    """Join the process group that the launcher described in the environment; nothing where there is no launcher.

    torchrun sets RANK, WORLD_SIZE, LOCAL_RANK and MASTER_*; under srun the job script sets them from Slurm's variables.

    Args:
        without_launcher: where there is none, form a group of this process alone; DeepSpeed cannot do without.
    """
    if dist.is_initialized() or not (without_launcher or "RANK" in os.environ):
        return
    if "RANK" not in os.environ:
        variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(variables, MASTER_PORT=str(_free_port()))
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
    dist.init_process_group(backend="nccl" if torch.cuda.is_available() else "gloo", timeout=_TIMEOUT)


def barrier() -> None:
    """Wait until every rank is here."""
    if dist.is_initialized():
        dist.barrier()


def broadcast_object(value: T) -> T:
    """Rank 0's `value`, on every rank; anything that pickle takes."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=device())
    return box[0]


def all_gather_objects(value: T) -> list[T]:
    """Every rank's `value`, in the order of ranks; anything that pickle takes."""
    values = [value] * world_size()
    if world_size() == 1:
        return values
    dist.all_gather_object(values, value)
    return values


def mean(values: dict[str, float]) -> dict[str, float]:
    """The mean over ranks of each value; every rank must hold the same keys."""
    if world_size() == 1 or not values:
        return values
    total = torch.tensor([values[key] for key in sorted(values)], dtype=torch.float64, device=device())
    dist.all_reduce(total)
    return dict(zip(sorted(values), (total / world_size()).tolist(), strict=True))


def sum_tensor(value: torch.Tensor) -> torch.Tensor:
    """The sum over ranks, of the same shape as this rank's `value`."""
    if world_size() > 1:
        value = value.clone()
        dist.all_reduce(value)
    return value


def broadcast_tensor(value: torch.Tensor) -> torch.Tensor:
    """Rank 0's `value`, of the same shape on every rank."""
    if world_size() > 1:
        value = value.contiguous().clone()
        dist.broadcast(value, src=0)
    return value


def mean_with_gradient(value: torch.Tensor) -> torch.Tensor:
    """The mean over ranks, whose gradient goes to this rank's `value` as if it were the whole mean.

    DistributedDataParallel averages gradients over ranks, which makes that the gradient of a function of the mean.
    """
    if world_size() == 1:
        return value
    return value + (sum_tensor(value.detach()) / world_size() - value.detach())


def leave(status: int) -> NoReturn:
    """End this process at once with exit code `status`, with 0 when every rank is here.

    gloo sometimes aborts in its destructors after the work is done ("terminate called without an
    active exception"), which would turn a finished stage into a failed job; so none of them runs.
    """
    if dist.is_initialized():
        if status == 0:
            dist.barrier()
            dist.destroy_process_group()
        logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
