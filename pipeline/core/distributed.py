"""Ranks and collectives, the same in one process, under torchrun and under srun."""

from __future__ import annotations

import hashlib
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, MutableMapping
from datetime import timedelta
from typing import NoReturn, TypeVar, cast

import torch
import torch.distributed as dist

from pipeline.core import gpus, rendezvous
from pipeline.core.errors import UserError
from pipeline.core.loopback import LOOPBACK, free_port
from pipeline.core.rendezvous import Launched

T = TypeVar("T")
log = logging.getLogger(__name__)

# What rank 0 does alone while the others wait, and what a slow file system does, may take this long.
_CONTROL_TIMEOUT = timedelta(hours=12)
_TIMEOUT = timedelta(minutes=30)  # of collectives of tensors, until `set_collective_timeout`
_control: dist.ProcessGroup | None = None  # gloo, for verdicts, objects and barriers; None: there is one group
# What gloo and NCCL say when another process has ended.
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exit")
_TELL_S = 2.0  # seconds that a process waits to hear whether another one tells the same error
_local_rank: int | None = None  # None: what the environment says
_store: dist.Store | None = None  # of the launched processes; it outlives the group


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
    """This process's number among those of its node, from 0, as its launcher said."""
    return gpus.local_rank(os.environ) if _local_rank is None else _local_rank


def device() -> torch.device:
    """The GPU of this process, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", gpus.own_index(os.environ, torch.cuda.device_count()))


def let_local_rank_be_the_device() -> None:
    """From here on LOCAL_RANK is the index of this process's GPU, which may be the only one that it sees.

    DeepSpeed and accelerate take the one for the other: when they start, and ZeRO-3 in steps of the training, too.
    """
    global _local_rank
    if torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
        _local_rank = local_rank()
        os.environ["LOCAL_RANK"] = str(device().index)


def forget_leftovers(environment: MutableMapping[str, str], joins: bool) -> None:
    """Remove what is left of a launcher that did not start this process, and say so. `joins`: it may be one of several.

    Raises:
        UserError: a launcher's variable is not the number that it should be.
    """
    if joins:
        if rendezvous.launched(environment) is None:
            environment.pop("LOCAL_RANK", None)
    elif "RANK" in environment:
        log.warning("RANK is set, and this stage is one process: ignored")
        for name in ("RANK", "WORLD_SIZE"):
            environment.pop(name, None)


def init(without_launcher: bool = False) -> None:
    """Join the process group that the launcher described in the environment; nothing where there is no launcher.

    torchrun sets RANK, WORLD_SIZE, LOCAL_RANK and MASTER_*; under srun the job script sets them from Slurm's variables.

    Args:
        without_launcher: where there is none, form a group of this process alone; DeepSpeed cannot do without.

    Raises:
        UserError: the processes do not find each other in time, two of them have the same GPU, or the launcher's
            variables are none.
    """
    global _store
    if dist.is_initialized():
        return
    launch = rendezvous.launched(os.environ)
    if not (without_launcher or launch):
        return
    if launch is None:
        launch = Launched(rank=0, processes=1, address=LOOPBACK, port=free_port(), all_local=True)
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR=launch.address)
        os.environ["MASTER_PORT"] = str(launch.port)
        _store = dist.HashStore()
    if launch.all_local:
        rendezvous.listen_locally(os.environ)
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    _store = _store or rendezvous.meet(launch, agent=os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True")
    if torch.cuda.is_available() and launch.processes > 1:
        _expect_a_gpu_each(launch, _store, str(torch.cuda.get_device_properties(device()).uuid))
    _join(launch, _store)


def _expect_a_gpu_each(launch: Launched, store: dist.Store, uuid: str) -> None:
    """Raises UserError on every rank when two have the same GPU, of which NCCL would only say that it failed."""
    store.set(f"gpu/{launch.rank}", f"{socket.gethostname()} {gpus.identity(os.environ, uuid)}")
    if launch.rank == 0:
        names = [f"gpu/{rank}" for rank in range(launch.processes)]
        store.wait(names, timedelta(seconds=rendezvous.MEETING_S))
        try:
            gpus.refuse_shared([_host_and_gpu(store.get(name).decode()) for name in names])
            store.set("gpus", "")
        except UserError as error:
            store.set("gpus", str(error))
    if mistake := store.get("gpus").decode():
        raise UserError(mistake)


def _host_and_gpu(text: str) -> tuple[str, str]:
    host, _, gpu = text.partition(" ")
    return host, gpu


def _join(launch: Launched, store: dist.Store) -> None:
    """Form the process group. Raises UserError when the processes do not reach each other in time."""
    try:
        dist.init_process_group(
            backend="nccl" if torch.cuda.is_available() else "gloo",
            store=dist.PrefixStore("group", store),
            rank=launch.rank,
            world_size=launch.processes,
            timeout=timedelta(seconds=rendezvous.MEETING_S),
        )
        dist.barrier()  # NCCL connects at its first collective
    except RuntimeError as error:
        raise rendezvous.did_not_meet(launch, error) from error
    global _control
    if launch.processes > 1:
        _control = dist.new_group(backend="gloo", timeout=_CONTROL_TIMEOUT)
    dist.distributed_c10d._set_pg_timeout(_TIMEOUT)


def set_collective_timeout(seconds: float) -> None:
    """Of every group but the one for control: also of those that DeepSpeed and accelerate have made by now."""
    if not dist.is_initialized():
        return
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not _control:
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def barrier() -> None:
    """Wait until every rank is here."""
    if dist.is_initialized():
        dist.barrier(group=_control)


def broadcast_object(value: T) -> T:
    """Rank 0's `value`, on every rank; anything that pickle takes."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=_control, device=None if _control else device())
    return box[0]


def all_gather_objects(value: T) -> list[T]:
    """Every rank's `value`, in the order of ranks; anything that pickle takes."""
    values = [value] * world_size()
    if world_size() == 1:
        return values
    dist.all_gather_object(values, value, group=_control)
    return values


def gather_objects(value: T) -> list[T]:
    """Every rank's `value` on rank 0, in the order of ranks, nothing on the others; anything that pickle takes."""
    if world_size() == 1:
        return [value]
    values: list[T | None] = [None] * world_size()
    dist.gather_object(value, values if is_main() else None, group=_control)
    return cast(list[T], values) if is_main() else []


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


def mean_tensor(value: torch.Tensor) -> torch.Tensor:
    """The mean over ranks, of the same shape as this rank's `value`; on a GPU it waits for nothing."""
    return sum_tensor(value) / world_size() if world_size() > 1 else value


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


def tells(message: str) -> bool:
    """Whether this process is to tell an error that ends it: of processes that all have the same one, one does.

    Rank 0 does if it has that error within two seconds.
    """
    if _store is None:  # nobody has met yet, and all read the same command line
        return os.environ.get("RANK", "0") == "0"
    if world_size() == 1:
        return True
    digest = hashlib.sha256(message.encode(errors="replace")).hexdigest()
    try:
        if is_main():
            _store.set("error of rank 0", digest)
            _wait_until(lambda: _store.add("other errors", 0) >= world_size() - 1)  # it serves the store
            return True
        _wait_until(lambda: _store.check(["error of rank 0"]))
        told = _store.check(["error of rank 0"]) and _store.get("error of rank 0").decode() == digest
        mine = _store.compare_set(f"error {digest}", "", str(rank())).decode() == str(rank())
        _store.add("other errors", 1)
    except RuntimeError:  # rank 0 is gone
        return True
    return mine and not told


def lost_another(error: BaseException) -> bool:
    """Whether `error` only says that another process of the group has ended: that one says why."""
    return isinstance(error, RuntimeError) and _store is not None and any(sign in str(error) for sign in _LOST)


def _wait_until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _TELL_S
    while not done() and time.monotonic() < deadline:
        time.sleep(0.02)


def leave(status: int) -> NoReturn:
    """End this process at once with exit code `status`, with 0 when every rank is here.

    gloo sometimes aborts in its destructors after the work is done ("terminate called without an
    active exception"), which would turn a finished stage into a failed job; so none of them runs.
    """
    if dist.is_initialized():
        if status == 0:
            barrier()
            dist.destroy_process_group()
        logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
