"""The preflight: seconds of checks before a training on several processes, which can save hours.

    python -m pipeline.cli.preflight runs/x --stage transformer --hosts a,b --bad-hosts FILE     on every rank

Ranks announce themselves (`roll_call.py`) before they import torch. Each host checks itself: free disk in the run
directory, the stage's inputs readable, its clock against the file system's (locks depend on it), its GPUs
(`device_check.py`). Then all ranks all-reduce and multiply matrices. Rank 0 prints which host is bad and why, and
appends the names to FILE; a host on which somebody was late, or that only waited for it, is never among them.
Exit 0: passed; 2: two ranks have one GPU, or rank 0 too few open files; 3: bad hosts; 4: the all-reduce failed on all
hosts, so none can be singled out; 5: not all came.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from pipeline.config.pipeline import load_pipeline
from pipeline.core import gpus
from pipeline.core.errors import UserError
from pipeline.core.file_system import CLOCK_TOLERANCE_S, clock_skew_s
from pipeline.core.process_limits import open_files
from pipeline.orchestration.graph import inputs_of, stage_named
from pipeline.orchestration.run_directory import RunDirectory, config_of
from pipeline.slurm.roll_call import Announced, RollCall

_FILES_PER_INPUT = 64
# A rank that has announced itself lives, and may import from a cold disk for so many times the patience.
_IMPORT_PATIENCE = 5
_ALL_REDUCE_PATIENCE = 2  # likewise, for all that the all-reduce takes; each call of it may take the patience once
_OWN_FILES = 100  # of Python and torch
MISTAKE, BAD_HOSTS, NO_HOST_TO_BLAME, LATE = 2, 3, 4, 5


@dataclass
class Verdict:
    """What rank 0 found.

    `bad`: what is wrong, by host; `late`: who did not come; `notes`: what is worth telling; `mistake`: the user's.
    """

    bad: dict[str, str] = field(default_factory=dict)
    late: str = ""
    nobody: str = ""  # what failed everywhere
    notes: list[str] = field(default_factory=list)
    mistake: str = ""

    @property
    def exit_code(self) -> int:
        if self.bad:
            return BAD_HOSTS
        if self.nobody:
            return NO_HOST_TO_BLAME
        if self.mistake:
            return MISTAKE
        return LATE if self.late else 0


def too_few_files(processes: int) -> str:
    """Why rank 0 cannot hear all: each has a connection to the roll call and one to torch's store; empty: it can."""
    needed = 2 * processes + _OWN_FILES
    if open_files() >= needed:
        return ""
    return (
        f"expected rank 0 of {processes} processes to be allowed {needed} open files, found {open_files()}: raise the"
        " hard limit (`ulimit -Hn`; LimitNOFILE of slurmd, or limits.conf)"
    )


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
            path = runs.stage(name) / relative
            if path.is_dir():
                path = next(path.iterdir())
            with open(path, "rb") as file:
                file.read(1)
    return None


def _clock_skew(run_directory: Path) -> str | None:
    folder = run_directory / "slurm"
    folder.mkdir(exist_ok=True)
    skew_s = clock_skew_s(folder)
    if abs(skew_s) > CLOCK_TOLERANCE_S:
        return f"its clock is {skew_s:+.0f} s off the file system's"
    return None


def lead(
    call: RollCall, processes: int, hosts: list[str], problem: str | None, timeout_s: float, gpu: str = ""
) -> Verdict:
    """Rank 0's part, after its own check: hear all, all-reduce with all, compare. `gpu`: as in `follow`."""
    call.note(0, problem=problem or "", gpu=gpu)
    missing = call.wait_for("host", lambda: (call.first_arrival or 0) + timeout_s)
    if not missing:
        missing = call.wait_for("problem", lambda: (call.last_arrival or 0) + _IMPORT_PATIENCE * timeout_s)
    bad = _by_host(call, "problem")
    late = _who_is_late(call, missing, hosts) if missing else ""
    shared = "" if bad or late else _shared_gpu(call)
    if bad or late or shared:
        call.tell("stop")
        return Verdict(bad, late, mistake=shared)
    # First: who hears "go" connects to the store at once.
    listener = call.hand_over_listener()
    call.tell("go")
    deadline = time.monotonic() + (_ALL_REDUCE_PATIENCE + 1) * timeout_s
    call.note(0, **_measured(0, processes, timeout_s, listener))
    for rank in call.wait_for("failure", lambda: deadline, despite_deaths=True):
        how = "died in the all-reduce" if rank in call.died else "did not end the all-reduce, and says nothing"
        call.note(rank, silent=f"rank {rank} {how}")
    return _compare(call, hosts)


def follow(
    announced: Announced, rank: int, processes: int, problem: str | None, timeout_s: float, gpu: str = ""
) -> None:
    """The part of every other rank. `gpu`: the `gpus.identity` of its GPU; empty: it has none."""
    # Rank 0 says nothing before it has heard all.
    if announced.say(problem=problem or "", gpu=gpu) and announced.hear((2 + _IMPORT_PATIENCE) * timeout_s) == "go":
        announced.say(**_measured(rank, processes, timeout_s))


def _by_host(call: RollCall, fact: str) -> dict[str, str]:
    """What ranks said under `fact`, by host, where it is not empty."""
    found: dict[str, str] = {}
    for _, facts in sorted(call.said.items()):
        if facts.get(fact):
            found.setdefault(facts["host"], facts[fact])
    return found


def _shared_gpu(call: RollCall) -> str:
    """Which ranks have the same GPU, of which NCCL would only say that it failed; empty: none."""
    host_of = call.hosts()
    gpu_of = {rank: facts.get("gpu") or f"none of rank {rank}" for rank, facts in call.said.items()}
    try:
        gpus.refuse_shared([(host_of[rank], gpu_of[rank]) for rank in sorted(host_of)])
    except UserError as error:
        return str(error)
    return ""


def _who_is_late(call: RollCall, missing: list[int], hosts: list[str]) -> str:
    where = call.hosts()
    ranks = ", ".join(f"{rank} ({where.get(rank, 'not heard of')})" for rank in missing[:8])
    silent = [host for host in hosts if host not in where.values()]
    if died := sorted(call.died.intersection(missing)):
        return f"rank {died[0]} on {where.get(died[0], '?')} ended during its check: see its lines"
    started_s = time.monotonic() - (call.first_arrival or 0)
    return (
        f"{len(missing)} ranks did not come within {started_s:.0f} s of the first: {ranks}"
        + (f"; nothing was heard of {', '.join(silent)}" if silent else "")
        + (f"; rank 0 could not take a connection ({call.refused})" if call.refused else "")
        + ". Slow is not bad: no host is left out (preflight_timeout_s is the patience)"
    )


def _compare(call: RollCall, hosts: list[str]) -> Verdict:
    """What the measurements of all ranks say."""
    from pipeline.slurm.device_check import hardware_xids, kernel_log, slow_hosts

    silent = _by_host(call, "silent")
    if 0 < len(silent) < len(hosts):  # others failed since they waited for these
        return Verdict(silent)
    failures = silent | _by_host(call, "failure")
    if len(failures) == len(hosts) > 1:  # one of them makes the others fail, and nothing shows which
        return Verdict(nobody=f"the all-reduce failed everywhere: {next(iter(failures.values()))}")
    if failures:
        return Verdict(failures)
    host_of = call.hosts()
    slow: dict[str, str] = {}
    for fact, what, unit in (("tflops", "a matrix product", "TFLOP/s"), ("gb_per_s", "an all-reduce", "GB/s")):
        speeds = {rank: facts[fact] for rank, facts in call.said.items() if fact in facts}
        slow = slow_hosts(speeds, host_of, what, unit) | slow
    notes = [f"the kernel of {host_of[0]} says: {line}" for line in hardware_xids(kernel_log())[-3:]]
    if call.said[0].get("on_gpu"):
        return Verdict(slow, notes=notes)
    # Processors are shared with other jobs, and slow for a moment.
    return Verdict(notes=[*notes, *(f"{host} is slow: {text}" for host, text in slow.items())])


def share(rank: int) -> int:
    """What a rank adds in the all-reduce: another number than its neighbours', and so small that float32 is exact."""
    return rank % 7 + 1


def _measured(rank: int, processes: int, timeout_s: float, listener: int | None = None) -> dict[str, object]:
    """`_measure`, given up in time: NCCL waits without a limit for a rank that dies while they connect."""
    measured: dict[str, object] = {}
    measuring = threading.Thread(
        target=lambda: measured.update(_measure(rank, processes, timeout_s, listener)), name="all-reduce", daemon=True
    )
    measuring.start()
    waited_s = _ALL_REDUCE_PATIENCE * timeout_s
    measuring.join(waited_s)
    return dict(measured) or {"failure": f"rank {rank} did not end the all-reduce within {waited_s:.0f} s"}


def _measure(rank: int, processes: int, timeout_s: float, listener: int | None = None) -> dict[str, object]:
    """An all-reduce and a matrix product on this rank: `failure` (empty: none), and how fast they were."""
    import torch
    import torch.distributed as dist

    from pipeline.core import distributed
    from pipeline.slurm.device_check import matmul_tflops

    address, port, on_gpu = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), torch.cuda.is_available()
    timeout = timedelta(seconds=timeout_s)
    os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"  # without it NCCL's watchdog ends the process at a timeout
    try:
        if on_gpu:
            torch.cuda.set_device(distributed.device())
        store = dist.TCPStore(
            address, port, processes, rank == 0, timeout, wait_for_workers=False, master_listen_fd=listener
        )
        backend = "nccl" if on_gpu else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=processes, timeout=timeout)
        numbers = torch.full((1 << (24 if on_gpu else 18),), float(share(rank)), device=distributed.device())
        dist.all_reduce(numbers.clone())  # connects
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(numbers)
        total = float(numbers[:: 1 << 10].double().mean())  # waits for it
        reduced_s = time.perf_counter() - started
        expected = sum(map(share, range(processes)))
        if total != expected:
            return {"failure": f"rank {rank}: expected a sum of {expected:g}, found {total:g}"}
        speeds = {"gb_per_s": numbers.nbytes / reduced_s / 1e9, "tflops": matmul_tflops()}
        return {"failure": "", "on_gpu": on_gpu, **speeds}
    except Exception as error:
        return {"failure": f"rank {rank}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
