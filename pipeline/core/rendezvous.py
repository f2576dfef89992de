"""How the processes of a stage find each other: what the launcher says, where they listen, how long they wait.

Where all are on this machine they listen on loopback alone, so its name need not resolve and nobody else can connect.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from pipeline.core.errors import UserError
from pipeline.core.loopback import LOOPBACK

log = logging.getLogger(__name__)

MEETING_S = 300.0  # seconds that the processes of a stage may take to find each other
_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# What MPI's launchers set; accelerate and DeepSpeed would take it for ours.
_MPI = ("PMI_", "OMPI_COMM_WORLD_", "MV2_COMM_WORLD_")


@dataclass(frozen=True)
class Launched:
    """What the launcher said of this process: which one of how many it is, and where they meet."""

    rank: int
    processes: int
    address: str
    port: int
    all_local: bool  # every process is on this machine


def launched(environment: MutableMapping[str, str]) -> Launched | None:
    """What the launcher says; None if none started this process. Left-overs of another one are removed, and said.

    Raises:
        UserError: a variable is not the number that it should be.
    """
    for name in [name for name in environment if name.startswith(_MPI)]:
        del environment[name]
    if "RANK" not in environment:
        return None
    if missing := [name for name in _NEEDED if name not in environment]:
        log.warning("RANK is set and %s not: no launcher started this process; ignored", " and ".join(missing))
        for name in ("RANK", "WORLD_SIZE"):
            environment.pop(name, None)
        return None
    rank, processes, port = (_number(environment, name) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    if rank >= processes or not 0 < port < 2**16:
        raise UserError(
            f"expected RANK below WORLD_SIZE and a MASTER_PORT below 65536, found {rank}, {processes} and {port}:"
            " unset them, or let a launcher set them"
        )
    return Launched(rank, processes, environment["MASTER_ADDR"], port, _all_local(environment, processes))


def listen_locally(environment: MutableMapping[str, str]) -> None:
    """Make the backends listen on loopback alone, unless the environment names an interface."""
    with suppress(OSError):
        names = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
        for backend in ("GLOO", "NCCL"):
            if names:
                environment.setdefault(f"{backend}_SOCKET_IFNAME", names[0])


def meet(launch: Launched, agent: bool) -> dist.Store:
    """The store in which the processes find each other, once all are there.

    Args:
        launch: what the launcher says of this process.
        agent: torchrun's own process serves the store, and not rank 0.

    Raises:
        UserError: they do not find each other in time.
    """
    address = LOOPBACK if launch.all_local else launch.address
    serves = launch.rank == 0 and not agent
    try:
        listener = _listening(launch.port) if serves and launch.all_local else None
        return dist.TCPStore(
            address,
            launch.port,
            launch.processes,
            is_master=serves,
            timeout=timedelta(seconds=MEETING_S),
            wait_for_workers=not agent,
            master_listen_fd=listener,
        )
    except (RuntimeError, OSError) as error:
        raise did_not_meet(launch, error) from error


def did_not_meet(launch: Launched, error: Exception) -> UserError:
    """The one line for processes that do not find each other."""
    where = f"{LOOPBACK if launch.all_local else launch.address}:{launch.port}"
    cause = " ".join(str(error).split("\n")[0].split())[:200]
    return UserError(
        f"expected the {launch.processes} processes to meet at {where} within {MEETING_S:g} s, process {launch.rank}"
        f" found not all ({cause}): look whether each is started, whether each machine's name resolves (`getent hosts"
        " $(hostname)`) and the port is free; GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME names the network interface"
    )


def _number(environment: MutableMapping[str, str], name: str) -> int:
    text = environment[name]
    if not text.isdecimal():
        raise UserError(f"{name}: expected a number, found '{text}': unset it, or let a launcher set it")
    return int(text)


def _all_local(environment: MutableMapping[str, str], processes: int) -> bool:
    """torchrun and `smalti run` say how many processes are here; srun how many machines its step has."""
    if environment.get("LOCAL_WORLD_SIZE") == str(processes):
        return True
    return "SLURM_PROCID" in environment and environment.get("SLURM_STEP_NUM_NODES") == "1"


def _listening(port: int) -> int:
    """A socket that listens on loopback; its owner is the store."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((LOOPBACK, port))
        listener.listen()
        return listener.detach()
