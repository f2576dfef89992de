"""The cluster file: where jobs go and what each stage gets. See configs/cluster/example.yaml.

partition: gpu
default: {time: "04:00:00", cpus_per_task: 8, memory: 32G}
stages:
  transformer: {nodes: 4, gpus: 8, time: "24:00:00"}
  tokenize: {gpus: 1, array: 16, array_limit: 4}
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from pipeline.config.base import Config, load_config
from pipeline.core.errors import UserError
from pipeline.orchestration.graph import ARRAY_STAGES, STAGE_NAMES, Stage

_TIME = re.compile(r"^(\d+|\d+:\d\d|\d+:\d\d:\d\d|\d+-\d+(:\d\d){0,2}|UNLIMITED|INFINITE)$", re.IGNORECASE)
_WORD = r"^[^\s\x00-\x1f\x7f]+$"  # what an #SBATCH line holds without quotes
# Options that the job file or the submission sets: a second one would win over it without a word.
_OURS = {
    "-J": "--job-name", "-o": "--output", "-e": "--error", "-a": "--array", "-d": "--dependency", "-D": "--chdir",
    "-p": "--partition", "-A": "--account", "-q": "--qos", "-t": "--time", "-N": "--nodes", "-n": "--ntasks",
    "-c": "--cpus-per-task",
}  # fmt: skip
_KEY_OF = {  # what to set in the cluster file instead; None: what the jobs of a stage need as it is
    "--job-name": None, "--output": None, "--error": None, "--array": "array", "--dependency": None, "--chdir": None,
    "--signal": "stop_ahead_s", "--requeue": None, "--no-requeue": None, "--open-mode": None, "--wrap": None,
    "--kill-on-invalid-dep": None, "--parsable": None, "--wait": None, "--test-only": None,
    "--partition": "partition", "--account": "account", "--qos": "qos", "--time": "time", "--nodes": "nodes",
    "--ntasks": "tasks_per_node", "--ntasks-per-node": "tasks_per_node", "--cpus-per-task": "cpus_per_task",
    "--gres": "gpus", "--mem": "memory",
}  # fmt: skip
_ARRAYS = f"{', '.join(ARRAY_STAGES[:-1])} or {ARRAY_STAGES[-1]}"
_MEMORY = re.compile(r"^\d+[KMGT]?$")


def _refuse_ours(flag: str) -> None:
    """Raises ValueError for an option of sbatch that Smalti sets itself."""
    name = flag.split("=")[0].split()[0]
    long = name if name.startswith("--") else _OURS.get(name[:2], name)
    if long == "--comment" and "=" not in flag:
        raise ValueError(f"expected a comment as --comment=TEXT, found '{flag}'")
    if long in _KEY_OF:
        instead = f"set {key} instead" if (key := _KEY_OF[long]) else "leave it out"
        raise ValueError(f"{long} is set by Smalti itself: {instead}")


def _of_one_line(value: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
    """`value`, or the ValueError that it holds a line break, which would begin a line of the job file."""
    for text in (value,) if isinstance(value, str) else value or ():
        if any(ord(character) < 32 or ord(character) == 127 for character in text):
            raise ValueError(f"expected text of one line, found {text!r}")
    return value


class Resources(Config):
    """What the jobs of a stage request. Every key can be set in `default` and replaced in `stages`."""

    partition: str | None = Field(None, pattern=_WORD, description="several by commas; None: the cluster's default")
    account: str | None = Field(None, pattern=_WORD, description="account that the jobs are charged to")
    qos: str | None = Field(None, pattern=_WORD, description="quality of service")
    time: str | None = Field(None, description="[days-]hours:minutes:seconds; None: the partition's default")
    nodes: int = Field(1, ge=1, description="nodes per job; only stages that train use several")
    gpus: int = Field(0, ge=0, description="GPUs per node")
    gpu_type: str | None = Field(None, pattern=_WORD, description="as in gres, e.g. a100")
    tasks_per_node: int | None = Field(
        None, ge=1, description="processes per node; None: one per GPU, or one without GPUs"
    )
    cpus_per_task: int = Field(1, ge=1, description="CPUs per process")
    memory: str | None = Field(None, description="memory per node, e.g. 64G")
    array: int | None = Field(None, ge=1, le=1000, description=f"jobs that share the work of {_ARRAYS}")
    array_limit: int | None = Field(None, ge=1, description="array tasks that run at the same time")
    flags: tuple[str, ...] = Field((), description="more options of sbatch, e.g. --exclusive or --constraint=ib")
    python: str | None = Field(None, description="replaces the cluster file's python")
    setup: tuple[str, ...] | None = Field(None, description="replaces the cluster file's setup")
    launcher: tuple[str, ...] | None = Field(None, description="replaces the cluster file's launcher")
    srun_flags: tuple[str, ...] | None = Field(None, description="replaces the cluster file's srun_flags")

    @field_validator("time", mode="before")
    @classmethod
    def _time(cls, value: object) -> object:
        if isinstance(value, int):
            raise ValueError("expected a time in quotes, e.g. '04:00:00' (YAML reads 4:00:00 as a number)")
        if isinstance(value, str) and not _TIME.match(value):
            raise ValueError("expected a time as Slurm writes it, e.g. '30', '04:00:00' or '2-00:00:00'")
        return value

    @field_validator("memory")
    @classmethod
    def _memory(cls, value: str | None) -> str | None:
        if value is not None and not _MEMORY.match(value):
            raise ValueError("expected a number with K, M, G or T, e.g. 64G")
        return value

    @field_validator("flags")
    @classmethod
    def _flags(cls, flags: tuple[str, ...]) -> tuple[str, ...]:
        for flag in flags:
            if not flag.startswith("-"):
                raise ValueError(f"expected options of sbatch such as --exclusive, one an entry, found '{flag}'")
            _refuse_ours(flag)
        return flags

    @field_validator("flags", "python", "launcher", "srun_flags")
    @classmethod
    def _one_line(cls, value: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        return _of_one_line(value)

    @property
    def comment(self) -> str | None:
        """The site's own comment, from `flags`; the mark of the run goes behind it."""
        found = [flag.partition("=")[2].strip("\"'") for flag in self.flags if flag.startswith("--comment=")]
        return found[-1] if found else None

    @property
    def ntasks_per_node(self) -> int:
        return self.tasks_per_node or max(self.gpus, 1)

    @property
    def world_size(self) -> int:
        return self.nodes * self.ntasks_per_node


class ClusterConfig(Config):
    """A cluster file."""

    default: Resources = Field(Resources(), description="what every stage gets, unless `stages` replaces it")
    stages: dict[str, Resources] = Field(default_factory=dict, description="by stage: what replaces single keys")

    python: str = Field(
        default_factory=lambda: sys.executable, description="interpreter on the nodes; default: the one that submits"
    )
    setup: tuple[str, ...] = Field((), description="lines of bash before the stage: modules, environments, variables")
    launcher: tuple[str, ...] = Field((), description="words before python, e.g. [apptainer, exec, --nv, smalti.sif]")
    srun_flags: tuple[str, ...] = Field((), description="more options of srun, e.g. --container-image=smalti.sqsh")

    supervisor_python: str | None = Field(
        None,
        description="Python 3.9 or newer of the nodes themselves, which starts the ranks and needs no packages; None:"
        " `python`, or python3 where a stage runs in a container (`launcher`, --container… in `srun_flags`)",
    )

    stop_ahead_s: int = Field(300, ge=10, le=65535, description="seconds before the time limit at which a stage saves")
    max_time_limits: int = Field(
        3, ge=0, description="how often a job may run into its time limit without progress before it fails"
    )
    max_crashes: int = Field(
        3, ge=0, description="how often a job whose rank crashed runs again without progress before it fails"
    )
    max_bad_hosts: int = Field(
        3, ge=0, description="how often a job moves away from a bad, late or dead host without progress before it fails"
    )
    max_task_retries: int = Field(
        2, ge=0, description="`max_crashes` of an array task, whose progress are the parts or shards that it has made"
    )
    preflight: Literal["several", "always", "never"] = Field(
        "several", description="check the hosts before a stage starts; several: in jobs of several processes"
    )
    preflight_timeout_s: int = Field(
        120, ge=5, description="seconds that ranks may come after the first one, and then for the all-reduce"
    )
    min_free_gb: float = Field(5.0, ge=0, description="free space that the preflight expects in the run directory")

    @field_validator("python", "supervisor_python", "launcher", "srun_flags")
    @classmethod
    def _one_line(cls, value: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        return _of_one_line(value)

    @model_validator(mode="after")
    def _check(self) -> ClusterConfig:
        if unknown := sorted(set(self.stages) - set(STAGE_NAMES)):
            raise ValueError(f"unknown stage '{unknown[0]}'; stages are {', '.join(STAGE_NAMES)}")
        for name, resources in self.stages.items():
            if resources.array and name not in ARRAY_STAGES:
                raise ValueError(f"{name} cannot be an array: only the work of {_ARRAYS} splits into array tasks")
        if self.default.array:
            raise ValueError(f"array belongs to a stage ({_ARRAYS}), not to default")
        return self

    def resources(self, stage: Stage) -> Resources:
        """The resources of this stage: `default`, updated by its entry in `stages`.

        Only stages that train run as several processes: the others get one node, one task and at most one GPU.

        Raises:
            UserError: `stages` asks for several processes where one does the work.
        """
        own = self.stages.get(stage.name, Resources())
        chosen = {name: getattr(own, name) for name in own.model_fields_set}
        merged = self.default.model_copy(update=chosen)
        unsaid = [name for name in ("python", "setup", "launcher", "srun_flags") if getattr(merged, name) is None]
        merged = merged.model_copy(update={name: getattr(self, name) for name in unsaid})
        if stage.trains:
            return merged
        several = [name for name in ("nodes", "tasks_per_node") if chosen.get(name, 1) not in (1, None)]
        if several or chosen.get("gpus", 0) > 1:
            what = several[0] if several else "gpus"
            raise UserError(
                f"cluster file: {stage.name}.{what} is {chosen[what]}, expected 1: one process does this stage"
                + (", or several by array" if stage.name in ARRAY_STAGES else "")
            )
        return merged.model_copy(update={"nodes": 1, "tasks_per_node": 1, "gpus": min(merged.gpus, 1)})


def seconds(time: str) -> float:
    """Of a time as Slurm writes it: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]].

    Infinite for UNLIMITED.

    Raises:
        ValueError: it is none.
    """
    if not _TIME.match(time):
        raise ValueError(f"expected a time as Slurm writes it, found '{time}'")
    days, _, clock = time.rpartition("-")
    if not clock.replace(":", "").isdigit():
        return float("inf")
    parts = [int(part) for part in clock.split(":")]
    # Behind days the first number is hours; alone it is minutes.
    if days:
        hours, minutes, rest = (*parts, 0, 0)[:3]
    else:
        hours, minutes, rest = (0, *parts, 0)[:3] if len(parts) < 3 else parts
    return int(days or 0) * 86400.0 + hours * 3600 + minutes * 60 + rest


def load_cluster(path: str | Path) -> ClusterConfig:
    return load_config(ClusterConfig, path)
