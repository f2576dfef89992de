"""Which GPU a process uses. Functions of the environment, of how many GPUs CUDA shows, and of their UUIDs; no torch.

A launcher either shows every process all GPUs of its host (Slurm's --gres, torchrun, `smalti run`), and each takes the
one of its local rank; or it shows each its own (--gpus-per-task, --gpu-bind, a site's own scripts), and then the local
rank is no index. Both come down to the local rank modulo what is visible, and a comparison of UUIDs.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence

from pipeline.core.errors import UserError

_VISIBLE = "CUDA_VISIBLE_DEVICES"


def listed(environment: Mapping[str, str]) -> list[str] | None:
    """What CUDA_VISIBLE_DEVICES lists: indices, UUIDs of GPUs or of MIG instances; None if it is not set."""
    if _VISIBLE not in environment:
        return None
    entries: list[str] = []
    for entry in environment[_VISIBLE].split(","):
        if entry.strip() in ("", "-1", "NoDevFiles"):  # CUDA ignores what comes behind a device that does not exist
            break
        entries.append(entry.strip())
    return entries


def local_rank(environment: Mapping[str, str]) -> int:
    """This process's number among those of its host, from 0. Raises UserError if LOCAL_RANK is no number."""
    text = environment.get("LOCAL_RANK", "0")
    if not text.isdecimal():
        raise UserError(f"LOCAL_RANK: expected a number, found '{text}': unset it, or let a launcher set it")
    return int(text)


def show_own_instance(environment: MutableMapping[str, str]) -> None:
    """Of several MIG instances leave only this process's own visible: CUDA would show it the first and no other.

    Has no effect once CUDA has started.
    """
    entries = listed(environment) or []
    if len(entries) > 1 and all(entry.startswith("MIG-") for entry in entries):
        environment[_VISIBLE] = entries[local_rank(environment) % len(entries)]


def own_index(environment: Mapping[str, str], visible: int) -> int:
    """The index of this process's GPU among the `visible` ones, at least 1. Tasks of an array may share a GPU."""
    return local_rank(environment) % visible


def identity(environment: Mapping[str, str], uuid: str) -> str:
    """What tells this process's GPU from all others; `uuid`: CUDA's, which instances of one GPU may have in common."""
    entries = listed(environment) or []
    return entries[0] if len(entries) == 1 and entries[0].startswith("MIG-") else uuid


def refuse_shared(gpus: Sequence[tuple[str, str]]) -> None:
    """Raises UserError when two processes of a training have the same GPU.

    Args:
        gpus: host and `identity` of each rank.
    """
    first: dict[str, int] = {}
    for rank, (host, gpu) in enumerate(gpus):
        if gpu in first:
            raise UserError(
                f"expected a GPU for each process of a training, found ranks {first[gpu]} and {rank} on the same"
                f" one ({gpu} of {host}): start no more processes than GPUs on a host (processes, or gpus and"
                " tasks_per_node of the cluster file), or let each see another one (CUDA_VISIBLE_DEVICES, --gpu-bind)"
            )
        first[gpu] = rank


def refuse_more_than(gpus: int, processes: int) -> None:
    """Raises UserError when `processes` of a training would share `gpus` GPUs; 0: they train on processors."""
    if 0 < gpus < processes:
        raise UserError(
            f"processes: expected at most {gpus}, the GPUs of this machine (or of CUDA_VISIBLE_DEVICES), for a stage"
            f" that trains, found {processes}: lower it, or train on processors with CUDA_VISIBLE_DEVICES= (empty)"
        )
