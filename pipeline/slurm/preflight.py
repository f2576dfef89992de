"""The preflight: seconds of checks before a training on several processes, which can save hours.

    python -m pipeline.cli.preflight runs/x --stage transformer --hosts a,b --bad-hosts FILE     on every rank

Each host checks itself: free disk in the run directory, the stage's inputs readable, its clock against the file
system's (locks depend on it), its device. Then all ranks meet and all-reduce. Rank 0 prints which host is bad and why,
and appends the names to FILE. Exit 0: passed; 3: bad hosts; 4: the all-reduce failed on all hosts, so none can be
singled out.
"""

from __future__ import annotations

import os
import shutil
import socket
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config.pipeline import load_pipeline
from pipeline.core import distributed
from pipeline.core.errors import UserError
from pipeline.orchestration.graph import inputs_of, stage_named
from pipeline.orchestration.run_directory import RunDirectory, config_of

if TYPE_CHECKING:
    from torch.distributed import Store

CLOCK_TOLERANCE_S = 10.0
_FILES_PER_INPUT = 64
_LAST_READS_S = 5.0
BAD_HOSTS, NO_HOST_TO_BLAME = 3, 4


def check_host(run_directory: Path, stage: str, min_free_gb: float) -> str | None:
    """What is wrong with this host, or None."""
    try:
        directory = run_directory / stage
        free_gb = shutil.disk_usage(directory if directory.is_dir() else run_directory).free / 1e9
        if free_gb < min_free_gb:
            return f"expected {min_free_gb:g} GB free in {directory}, found {free_gb:.3g}"
        return _unreadable_input(run_directory, stage) or _clock_skew(run_directory)
    except (OSError, UserError) as error:
        return str(error)


def _unreadable_input(run_directory: Path, stage: str) -> str | None:
    runs = RunDirectory(run_directory)
    config = load_pipeline(config_of(run_directory))
    for name in inputs_of(config, stage_named(stage)):
        manifest = runs.manifest(name)
        if manifest is None:
            return f"cannot read a finished {name} in {runs.stage(name)}"
        for relative in list(manifest["outputs"])[:_FILES_PER_INPUT]:
            with open(runs.stage(name) / relative, "rb") as file:
                file.read(1)
    return None


def _clock_skew(run_directory: Path) -> str | None:
    probe = run_directory / "slurm" / f".clock-{socket.gethostname()}-{os.getpid()}"
    probe.parent.mkdir(exist_ok=True)
    probe.write_text("?")
    skew_s = time.time() - probe.stat().st_mtime
    probe.unlink()
    if abs(skew_s) > CLOCK_TOLERANCE_S:
        return f"its clock is {skew_s:+.0f} s off the file system's"
    return None


def meet(rank: int, processes: int, hosts: list[str], problem: str | None, timeout_s: float) -> dict[str, str]:
    """Bad hosts and what is wrong with them, on rank 0; on the others only that rank 0 cannot be reached."""
    import torch.distributed as dist

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    timeout = timedelta(seconds=timeout_s)
    try:
        store = dist.TCPStore(
            address, port, processes, is_master=rank == 0, timeout=timeout, wait_for_workers=False
        )  # fmt: skip
    except (RuntimeError, ValueError) as error:
        return {hosts[0]: f"rank {rank} cannot reach {address}:{port} there ({str(error).splitlines()[0]})"}
    store.set(f"seen/{rank}", problem or "")
    if rank == 0:
        found = _collect(store, "seen", processes, hosts, timeout_s, "no sign of rank {} within {:.0f} s")
        store.set("verdict", "stop" if found else "go")
    try:
        go = store.get("verdict") == b"go"
    except RuntimeError:
        return {}
    if go:
        store.set(f"reduced/{rank}", _all_reduce(store, rank, processes, timeout))
    if rank:
        store.set(f"done/{rank}", "")
        return {}
    # The store ends with this process while the others may still be reading: wait for those that answered.
    _collect(store, "done", processes, hosts, _LAST_READS_S, "", first=1)
    if not go:
        return found
    failures = _collect(store, "reduced", processes, hosts, timeout_s, "rank {} did not end the all-reduce in {:.0f} s")
    if len(failures) == len(hosts) > 1:  # one of them makes the others fail, and nothing shows which
        return {
            "(any of " + ",".join(hosts) + ")": f"the all-reduce failed everywhere: {next(iter(failures.values()))}"
        }
    return failures


def _collect(
    store: Store, prefix: str, processes: int, hosts: list[str], timeout_s: float, missing: str, first: int = 0
) -> dict[str, str]:
    """The problems that ranks reported, by host; `missing` where a rank did not answer. An empty report: none."""
    deadline = time.monotonic() + timeout_s
    found: dict[str, str] = {}
    for rank in range(first, processes):
        host = hosts[rank * len(hosts) // processes]
        left_s = max(deadline - time.monotonic(), 0.1)
        try:
            store.wait([f"{prefix}/{rank}"], timedelta(seconds=left_s))
            problem = store.get(f"{prefix}/{rank}").decode()
        except RuntimeError:
            problem = missing.format(rank, timeout_s)
        if problem:
            found.setdefault(host, problem)
    return found


def _all_reduce(store: Store, rank: int, processes: int, timeout: timedelta) -> str:
    """What went wrong in an all-reduce of 1 MB; empty if every rank's number arrived."""
    import torch
    import torch.distributed as dist

    try:
        if torch.cuda.is_available():
            torch.cuda.set_device(distributed.device())
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        group_store = dist.PrefixStore("group", store)
        dist.init_process_group(backend, store=group_store, rank=rank, world_size=processes, timeout=timeout)
        numbers = torch.full((1 << 18,), float(rank + 1), device=distributed.device())  # 1 MB
        dist.all_reduce(numbers)
        total = float(numbers.double().mean())
    except Exception as error:
        return f"rank {rank}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    expected = processes * (processes + 1) / 2
    return "" if total == expected else f"rank {rank}: expected a sum of {expected:g}, found {total:g}"
