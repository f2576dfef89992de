"""Processors, memory, GPUs, the compiler, limits of the process, and processes that talk to each other."""

from __future__ import annotations

import os
import resource
import subprocess
import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import psutil

from pipeline.core.loopback import LOOPBACK
from pipeline.doctor.finding import Finding, fail, note, ok, warn

_FEW_FILES = 1024  # of a process: image shards and token arrays are kept open
_INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
_ALL_REDUCE_S = 20.0


def processors() -> Iterator[Finding]:
    usable, every = len(os.sched_getaffinity(0)), psutil.cpu_count() or 0
    memory = psutil.virtual_memory()
    yield ok(
        "processors",
        f"{usable} of {every} usable; {memory.available / 1e9:.0f} of {memory.total / 1e9:.0f} GB memory free",
    )


def gpus() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        yield from _no_gpus(torch.version.cuda)
        return
    for index in range(torch.cuda.device_count()):
        name, (free, total) = torch.cuda.get_device_name(index), torch.cuda.mem_get_info(index)
        text = f"{name}: {free / 1e9:.0f} of {total / 1e9:.0f} GB free"
        if free < 0.9 * total:
            yield warn(f"gpu {index}", f"{text}: another process uses it, see nvidia-smi")
        elif not torch.cuda.is_bf16_supported(including_emulation=False):
            yield warn(f"gpu {index}", f"{text}; no bfloat16: set training.precision: fp16")
        else:
            yield ok(f"gpu {index}", text)


def _no_gpus(cuda: str | None) -> Iterator[Finding]:
    """`cuda`: the version that torch is built for, None for a build without."""
    seen = _nvidia_smi()
    if seen and cuda is None:
        yield fail(
            "gpus", f"the driver shows {seen}, but this torch is built for CPUs: install torch's build for your CUDA"
        )
    elif seen:
        yield fail(
            "gpus",
            f"the driver shows {seen}, torch (CUDA {cuda}) sees none: is CUDA_VISIBLE_DEVICES set"
            f" ('{os.environ.get('CUDA_VISIBLE_DEVICES', '')}'), and is the driver new enough for it?",
        )
    else:
        from pipeline.core.arithmetic import cpu_has_bf16

        without = "" if cpu_has_bf16() else ", which have no products in bf16: training.precision bf16 is fp32 here"
        yield note("gpus", f"none on this machine: everything runs on its processors{without}")


def _nvidia_smi() -> str:
    """How many GPUs the driver shows, in words; empty where there is no driver or it shows none."""
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    lines = [line for line in done.stdout.splitlines() if line.startswith("GPU ")]
    return f"{len(lines)} GPU{'s' if len(lines) > 1 else ''}" if done.returncode == 0 and lines else ""


def open_files() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < _FEW_FILES:
        yield warn(
            "open files",
            f"expected a limit of {_FEW_FILES} or more, found {hard}: raise it (`ulimit -Hn`, limits.conf)",
        )
    else:
        limit = "unlimited" if hard == resource.RLIM_INFINITY else hard
        yield ok("open files", f"soft limit {soft}, hard limit {limit}")


def compiler() -> Iterator[Finding]:
    """What `--compile` and training.compile need on this machine's device."""
    import torch

    from pipeline.core.compiler import missing_compiler

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if missing := missing_compiler(device):
        slower = ", and sparse attention is slower" if device.type == "cuda" else ""
        yield note("compiler", f"no {missing.removeprefix('a ')}: models cannot be compiled here{slower}")
    else:
        yield ok("compiler", f"models can be compiled for {device.type}")


def interfaces() -> Iterator[Finding]:
    """The network interfaces that gloo and NCCL are told to use."""
    there = psutil.net_if_addrs()
    for variable in _INTERFACES:
        named = os.environ.get(variable, "").lstrip("^=")
        missing = [name for name in named.split(",") if name and not any(n.startswith(name) for n in there)]
        if missing and not os.environ[variable].startswith("^"):
            yield fail(
                "network",
                f"{variable}={os.environ[variable]}: no interface {missing[0]} here; there are {', '.join(there)}",
            )
            return
    yield from _all_reduce()


def _all_reduce() -> Iterator[Finding]:
    """Two ranks of gloo in this process, over the interface that a training would take."""
    import torch
    import torch.distributed as dist

    limit = timedelta(seconds=_ALL_REDUCE_S)
    store = dist.TCPStore(LOOPBACK, 0, 2, is_master=True, timeout=limit, wait_for_workers=False)
    sums: dict[int, float] = {}
    errors: list[Exception] = []

    def rank(number: int) -> None:
        try:
            client = dist.TCPStore(LOOPBACK, store.port, 2, is_master=False, timeout=limit)
            group: Any = dist.ProcessGroupGloo(dist.PrefixStore("doctor", client), number, 2, limit)
            value = torch.full((1 << 18,), float(number + 1))  # 1 MB
            group.allreduce([value]).wait()
            sums[number] = float(value.mean())
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=rank, args=(number,), daemon=True) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(_ALL_REDUCE_S + 5)
    if errors or sums != {0: 3.0, 1: 3.0}:
        said = str(errors[0]).splitlines()[0] if errors else f"sums {sums} after {_ALL_REDUCE_S:.0f} s"
        yield fail(
            "network",
            f"expected an all-reduce of two ranks by gloo, found: {said}: set GLOO_SOCKET_IFNAME to an interface of"
            f" {', '.join(psutil.net_if_addrs())}",
        )
    else:
        yield ok(
            "network", f"all-reduce by gloo over {os.environ.get('GLOO_SOCKET_IFNAME') or 'the default interface'}"
        )
