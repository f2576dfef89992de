"""`smalti submit` and `resubmit` while jobs of the run are active, on stand-ins for squeue and sbatch."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.config.pipeline import load_pipeline
from pipeline.core.errors import UserError
from pipeline.core.lock import Lock
from pipeline.slurm import submit
from pipeline.slurm.cluster import load_cluster
from tests.conftest import TINY
from tests.launch import launch

SBATCH = 'echo "$*" >>calls; echo $((100 + $(wc -l <calls)))'


class Cluster:
    """A run that was submitted once: `prepare` as an array of eight tasks and a join."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run = folder, folder / "tiny"
        (folder / "cluster.yaml").write_text("stages: {prepare: {array: 8, array_limit: 4}}")
        self.says("sbatch", SBATCH)
        self.says("squeue", "")
        self.smalti("submit", str(TINY), f"runs={folder}", "--cluster", "cluster.yaml")
        (folder / "calls").unlink()

    def says(self, command: str, lines: str) -> None:
        (self.folder / command).write_text(f"#!/bin/bash\n{lines}\n")
        (self.folder / command).chmod(0o755)

    def has(self, *jobs: str) -> None:
        """What squeue says: "12_5 prepare.tasks RUNNING"."""
        lines = [job.replace("_", " ").split() for job in jobs]
        shown = [f"{n}|{task}|{state}|None|node1|1:00|smalti:{script}:{self.run}" for n, task, script, state in lines]
        self.says("squeue", "\n".join(f"echo '{line}'" for line in shown))

    def smalti(self, *arguments: str, check: bool = True) -> str:
        path = f"{self.folder}:{os.environ['PATH']}"
        return launch("pipeline", *arguments, cwd=self.folder, check=check, PATH=path)

    def resubmitted(self) -> list[str]:
        """The options and the job files that sbatch gets, in order."""
        self.smalti("resubmit", str(self.run))
        lines = [line.split()[1:] for line in (self.folder / "calls").read_text().splitlines()]
        return [" ".join([*line[:-1], Path(line[-1]).name]) for line in lines]


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


def test_resubmit_submits_only_the_missing_tasks_and_the_join_waits_for_them_and_for_the_active_ones(
    cluster: Cluster,
) -> None:
    cluster.has("12_3 prepare.tasks FAILED", "12_5 prepare.tasks RUNNING", "15_2 prepare.tasks PENDING")
    tasks, join = cluster.resubmitted()[:2]
    assert tasks == "--array=0,1,3,4,6,7%4 prepare.tasks.sbatch"
    assert join == "--dependency=afterok:12_5:15_2:101 prepare.sbatch"  # never of 12, whose task 3 has failed


def test_submit_leaves_the_config_of_a_stage_at_work_as_it_is(cluster: Cluster) -> None:
    config = (cluster.run / "config.yaml").read_text()
    changed = ["submit", str(TINY), f"runs={cluster.folder}", "--cluster", "cluster.yaml", "prepare.shard_size=7"]
    with Lock(cluster.run / "locks" / "prepare.json", "stage prepare"):  # by `smalti run` here, and not by a job
        told = cluster.smalti(*changed, check=False)
    assert "stage prepare, with another config (prepare.shard_size: 64 -> 7), is already being written by" in told
    assert (cluster.run / "config.yaml").read_text() == config
    assert not (cluster.folder / "calls").exists()


def test_resubmit_while_all_tasks_that_are_left_are_active_submits_the_join_alone(cluster: Cluster) -> None:
    cluster.has(*(f"12_{task} prepare.tasks RUNNING" for task in range(7)), "15_7 prepare.tasks RUNNING")
    active = ":".join([*(f"12_{task}" for task in range(7)), "15_7"])
    assert cluster.resubmitted()[0] == f"--dependency=afterok:{active} prepare.sbatch"


def test_no_job_is_made_to_wait_for_one_that_does_not_come_to_its_end(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.has("12_N/A prepare COMPLETING", "13_N/A report PENDING")
    monkeypatch.setenv("PATH", str(cluster.folder), prepend=":")
    monkeypatch.setattr(submit, "_ENDING_PATIENCE_S", 0.0)
    config = load_pipeline(cluster.run / "config.yaml")
    with pytest.raises(UserError, match=r"jobs 12 of .* to end, and they are still ending"):
        submit.submit_pipeline(config, TINY.name, load_cluster(cluster.folder / "cluster.yaml"))
    assert not (cluster.folder / "calls").exists()
