"""Slurm's client, its controller, and whether a cluster file asks for what the cluster has."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from pipeline.core.errors import UserError
from pipeline.doctor.finding import Finding, fail, note, ok
from pipeline.orchestration.graph import STAGES
from pipeline.slurm.cluster import ClusterConfig, Resources, load_cluster, seconds
from pipeline.slurm.scheduler import call


def cluster(path: Path | None) -> Iterator[Finding]:
    """`path`: the cluster file; without one only whether there is a Slurm."""
    if shutil.which("sbatch") is None:
        text = "no sbatch on this machine"
        if path:
            yield fail("slurm", f"{text}: run this on a login node of the cluster, or start slurm/testbed")
        else:
            yield note("slurm", f"{text}: jobs are submitted from a login node")
        return
    try:
        version = call(["sinfo", "--version"]).strip()
        call(["scontrol", "ping"])
        partitions = _partitions()
    except UserError as error:
        said = " ".join(str(error).replace("*", "").split())  # the controller is told of in rows of stars
        text = f"Slurm's commands are here, but {said}: see where SLURM_CONF points, or ask who runs the cluster"
        yield fail("slurm", text) if path else note("slurm", text)
        return
    yield ok("slurm", f"{version}; partitions {', '.join(sorted(partitions))}")
    if path:
        yield from _file(load_cluster(path), path, partitions)


def _file(config: ClusterConfig, path: Path, partitions: dict[str, float]) -> Iterator[Finding]:
    """Each stage's resources against the cluster; equal ones once."""
    if not shutil.which(config.python):
        yield fail("cluster file", f"expected an interpreter at python: {config.python}, found none (on this machine)")
    seen: dict[str, None] = {}
    for stage in STAGES:
        try:
            problem = _problem(config.resources(stage), partitions)
        except UserError as error:
            problem = str(error)
        if problem:
            seen.setdefault(f"{stage.name}: {problem}")
    for problem in seen:
        yield fail("cluster file", problem)
    if not seen:
        yield ok("cluster file", f"{path}: sbatch would take every stage")


def _problem(resources: Resources, partitions: dict[str, float]) -> str | None:
    """What the cluster refuses, or would let wait forever; None if nothing."""
    named = resources.partition.split(",") if resources.partition else []
    if unknown := [name for name in named if name not in partitions]:
        return f"partition: expected one of {', '.join(sorted(partitions))}, found '{unknown[0]}'"
    longest = max((partitions[name] for name in named or partitions), default=float("inf"))
    if resources.time and (asked := seconds(resources.time)) > longest:
        return f"time: expected at most {longest / 3600:g} hours, the limit of the partition, found {asked / 3600:g}"
    try:
        call(["sbatch", "--test-only", *_flags(resources), "--wrap=true"])
    except UserError as error:
        return str(error)
    return None


def _flags(resources: Resources) -> list[str]:
    """As the job file of the stage asks for them."""
    gpus = f"gpu:{resources.gpu_type}:{resources.gpus}" if resources.gpu_type else f"gpu:{resources.gpus}"
    asked = {
        "partition": resources.partition, "account": resources.account, "qos": resources.qos, "time": resources.time,
        "mem": resources.memory, "gres": gpus if resources.gpus else None, "nodes": resources.nodes,
        "ntasks-per-node": resources.ntasks_per_node, "cpus-per-task": resources.cpus_per_task,
    }  # fmt: skip
    return [f"--{name}={value}" for name, value in asked.items() if value is not None] + list(resources.flags)


def _partitions() -> dict[str, float]:
    """The time limit of each partition, in seconds."""
    lines = call(["sinfo", "--noheader", "--format=%R|%l"]).split()
    return {name: seconds(limit) for name, limit in (line.split("|", 1) for line in lines)}
