"""What asks a real Slurm: the doctor of a cluster file, and prepare as an array."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.conftest import TINY
from tests.launch import launch
from tests.slurm.conftest import Slurm, cluster_file, events, wait_until
from tests.slurm.test_crash import _launcher as launcher

pytestmark = pytest.mark.slurm


def test_the_doctor_names_what_the_cluster_would_refuse_or_let_wait_for_ever(slurm: Slurm, tmp_path: Path) -> None:
    asks = {
        "prepare": {"partition": "gpu"},
        "tokenize": {"time": "1-00:00:00"},
        "generate": {"account": "nobody"},
        "evaluate": {"memory": "4T"},
        "report": {"partition": "normal", "time": "01:00:00"},
    }
    cluster = cluster_file(tmp_path, stages=json.dumps(asks))
    output = slurm.smalti("doctor", str(TINY), "--cluster", str(cluster), check=False)
    told = [line[30:].strip() for line in output.splitlines() if "cluster file" in line[:30]]
    assert told[0] == "prepare: partition: expected one of normal, preempt, found 'gpu'"
    assert told[1] == "tokenize: time: expected at most 2 hours, the limit of the partition, found 24"
    assert [line.partition(":")[0] for line in told] == ["prepare", "tokenize", "evaluate"]
    assert "not available" in told[2]
    gone = tmp_path / "slurm.conf"
    gone.write_text("ClusterName=none\nSlurmctldHost=localhost(127.0.0.1)\nSlurmctldPort=1\n")
    output = launch("pipeline", "doctor", "--cluster", str(cluster), check=False, SLURM_CONF=str(gone))
    (line,) = [line for line in output.splitlines() if line[6:30].strip() == "slurm"]
    assert line.startswith("FAIL")
    assert "is DOWN" in line
    assert line.endswith(": see where SLURM_CONF points, or ask who runs the cluster")


def test_prepare_as_an_array_makes_the_bytes_of_one_process_even_where_requeue_is_refused(
    slurm: Slurm, local_run: Path, tmp_path: Path
) -> None:
    """Of three tasks one is asked to stop, and one is killed at its time limit."""
    lines = """if [[ $SLURM_ARRAY_TASK_ID == 1 && ! -e stopped ]]; then
until [[ -e stop ]]; do sleep 0.1; done
touch stopped
exit 0
fi
if [[ $SLURM_ARRAY_TASK_ID == 2 && ! -e killed ]]; then
touch killed
exec sleep 600
fi"""
    more = {"launcher": launcher(tmp_path, lines), "supervisor_python": sys.executable}
    cluster = cluster_file(tmp_path, stages="{prepare: {array: 3}}", **more)
    config = [str(TINY), f"runs={tmp_path}", "--cluster", str(cluster), "--only", "prepare"]
    slurm.smalti("submit", *config)
    run = tmp_path / "tiny"
    jobs = {entry["script"]: entry["id"] for entry in json.loads((run / "slurm" / "jobs.json").read_text())}
    records = {task: run / "slurm" / f"prepare.task-{task}.lives.json" for task in (1, 2)}
    for task, record in records.items():
        wait_until("the task's first life", lambda: events(record) == ["started"], run=run)  # noqa: B023
        slurm("scontrol", "update", f"jobid={jobs['prepare.tasks']}_{task}", "requeue=0")
    wait_until("the task at work", (tmp_path / "killed").exists)
    slurm("scontrol", "update", f"jobid={jobs['prepare.tasks']}_2", "EndTime=now+1")
    (tmp_path / "stop").touch()
    wait_until(
        "the join's end", lambda: slurm.states()[jobs["prepare"]] not in ("PENDING", "RUNNING", "COMPLETING"), run=run
    )
    assert events(records[1]) == ["started", "asked to stop", "started", "finished"]
    assert events(records[2]) == ["started", "time limit", "started", "finished"]
    for task, record in records.items():
        first, second = (life["job"] for life in json.loads(record.read_text())["lives"])
        assert first == f"{jobs['prepare.tasks']}_{task}"
        assert second.endswith(f"_{task}")
        assert second != first
    assert slurm.states()[jobs["prepare"]] == "COMPLETED"
    made, locally = (json.loads((path / "prepare" / "manifest.json").read_text()) for path in (run, local_run))
    assert made["hash"] == locally["hash"]
