"""What the supervisor keeps of a job, `slurm/<stage>.lives.json` in the run directory, and how far its stage got.

    {"jobs": {"12": "12", "15": "12"}, "lives": [{"job": "12", "outcome": "time limit", …}, …], "failure": ""}

`jobs` leads from each job to the one that it succeeds; a new submission starts a chain of its own.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from pipeline.core.atomic_io import write_json
from pipeline.core.checkpoint_names import saved_steps
from pipeline.slurm.supervisor.policy import Life

_TAIL_BYTES = 65_536
_LIVES_KEPT = 1000


@dataclass
class Record:
    """The lives of a stage's jobs, oldest first, and why the newest one failed."""

    lives: list[Life] = field(default_factory=list)
    jobs: dict[str, str] = field(default_factory=dict)  # job -> the first job of its chain
    failure: str = ""  # the line, and below it the last lines of the rank that failed first

    def chain(self, job: str) -> list[Life]:
        """The lives of this job and of those that it succeeds."""
        first = self.jobs.get(job, job)
        return [life for life in self.lives if self.jobs.get(life.job, life.job) == first]

    def newest_chain(self) -> list[Life]:
        """The lives since the stage was submitted last."""
        return self.chain(self.lives[-1].job) if self.lives else []


def record_path(run_directory: Path, stage: str, task: int | None = None) -> Path:
    """Where the lives of a stage's job, or of one task of its array, are kept."""
    return run_directory / "slurm" / f"{stage}{'' if task is None else f'.task-{task}'}.lives.json"


def record_paths(run_directory: Path, stage: str) -> list[Path]:
    """The records of a stage's jobs, those of the tasks of its array included."""
    folder = run_directory / "slurm"
    return [record_path(run_directory, stage), *sorted(folder.glob(f"{stage}.task-*.lives.json"))]


def read_record(path: Path) -> Record:
    """The record; an empty one if there is none, or if it is damaged: then budgets begin anew."""
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        known = {item.name for item in fields(Life)}
        lives = [Life(**{name: value for name, value in life.items() if name in known}) for life in found["lives"]]
        return Record(lives, dict(found["jobs"]), str(found["failure"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return Record()


def write_record(path: Path, record: Record) -> None:
    """Write the record atomically."""
    record.lives = record.lives[-_LIVES_KEPT:]
    write_json(path, asdict(record))


def progress(stage_directory: Path, trains: bool, array_task: tuple[int, int] | None = None) -> int:
    """How far a stage got: the step of its newest checkpoint; if it does not train, how many files it has made; of a
    task of an array, (index, count), how many pieces of its share: the files are those of all tasks."""
    if array_task is not None:
        index, count = array_task
        try:
            return int((stage_directory / "tasks" / f"{index}-of-{count}.pieces").read_text())
        except (OSError, ValueError):
            return 0
    if trains:
        return max(saved_steps(stage_directory / "checkpoints"), default=0)
    # Hidden ones are what a dead process left half-written.
    return sum(not name.startswith(".") for _, _, names in os.walk(stage_directory) for name in names)


def last_step(stage_directory: Path) -> int | None:
    """The last step in metrics.jsonl, which may be megabytes long and end in the middle of a line."""
    try:
        with open(stage_directory / "metrics.jsonl", "rb") as file:
            file.seek(max(file.seek(0, 2) - _TAIL_BYTES, 0))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        found = re.match(r'\{.*"step": *(\d+)', line)
        if found and line.endswith("}"):
            return int(found[1])
    return None
