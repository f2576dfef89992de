"""`smalti submit` of a whole pipeline: chained, counted once, an array task that dies, the same weights at the end."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import pytest

from pipeline.orchestration.graph import stage_named
from pipeline.slurm.preflight import check_host
from tests.conftest import STAGE_NAMES, TINY
from tests.slurm.conftest import STEPS, Slurm, assert_clean, cluster_file, events, processes_of, wait_until, weights

pytestmark = pytest.mark.slurm
T = TypeVar("T")


@dataclass
class Submitted:
    """What was seen while the run was on its way."""

    path: Path
    jobs: dict[str, int]  # by job file
    jobs_of_others: set[int] = field(default_factory=set)  # of earlier tests, which Slurm still remembers
    again: str = ""  # what the second `submit` printed
    jobs_after_again: set[int] = field(default_factory=set)
    join_state_after_death: str = ""
    final_states: dict[int, str] = field(default_factory=dict)


@pytest.fixture(scope="module")
def submitted(slurm: Slurm, tmp_path_factory: pytest.TempPathFactory) -> Submitted:
    folder = tmp_path_factory.mktemp("submitted")
    submit = ["submit", str(TINY), f"runs={folder}", STEPS, "--cluster", str(cluster_file(folder))]
    others = set(slurm.states())
    slurm.smalti(*submit)
    path = folder / "tiny"
    jobs = {entry["script"]: entry["id"] for entry in json.loads((path / "slurm" / "jobs.json").read_text())}
    seen = Submitted(path, jobs, others)

    def until(what: str, condition: Callable[[], T]) -> T:
        def look() -> T:
            seen.final_states |= slurm.states()  # each time: the controller forgets a job five minutes after its end
            return condition()

        return wait_until(what, look, run=path)

    at_work = until("an array task at work", lambda: processes_of(jobs["tokenize.tasks"], "stages.tokenize"))
    os.kill(at_work[0], signal.SIGKILL)
    records = path / "slurm"
    until("its death noted", lambda: any("crash" in events(f) for f in records.glob("tokenize.task-*.lives.json")))
    seen.join_state_after_death = slurm.job(jobs["tokenize"], "JobState")

    until("the transformer at work", lambda: processes_of(jobs["transformer"], "stages.transformer"))
    seen.again = slurm.smalti(*submit)
    seen.jobs_after_again = set(slurm.states())

    until("the last stage's end", lambda: slurm.states()[jobs["report"]] not in ("PENDING", "RUNNING", "COMPLETING"))
    return seen


def test_all_stages_end_completed_with_the_weights_of_a_local_run(submitted: Submitted, local_run: Path) -> None:
    assert {script: submitted.final_states[job] for script, job in submitted.jobs.items()} == dict.fromkeys(
        submitted.jobs, "COMPLETED"
    )
    assert all((submitted.path / stage / "_SUCCESS").exists() for stage in STAGE_NAMES)
    for stage in ("image-tokenizer", "transformer"):
        assert weights(submitted.path, stage) == weights(local_run, stage)
    images, locally = (
        json.loads((run / "generate" / "manifest.json").read_text())["outputs"] for run in (submitted.path, local_run)
    )
    assert images == locally


def test_an_array_task_that_dies_is_run_again_alone_and_the_join_waits(submitted: Submitted) -> None:
    seen = [events(record) for record in sorted((submitted.path / "slurm").glob("tokenize.task-*.lives.json"))]
    assert len(seen) == 3
    died = [task for task in seen if task == ["started", "crash", "started", "finished"]]
    unharmed = [task for task in seen if task == ["started", "finished"]]
    assert (len(died), len(unharmed)) == (1, 2)
    for stage in ("tokenize", "generate"):  # each has noted how far it came, the shards that it found done included
        records = (submitted.path / "slurm").glob(f"{stage}.task-*.lives.json")
        pieces = [json.loads(record.read_text())["lives"][-1]["progress"] for record in records]
        assert sum(pieces) == len(
            list((submitted.path / stage).glob("*/*.tar" if stage == "generate" else "*/*.tokens"))
        )
    assert submitted.join_state_after_death == "PENDING"


def test_submitting_again_doubles_nothing(submitted: Submitted) -> None:
    lines = {line.split()[0]: line for line in submitted.again.splitlines() if line.split()[:1]}
    assert lines["tokenize"].split()[-1] == "finished"
    assert str(submitted.jobs["transformer"]) in lines["transformer"]
    assert "running" in lines["transformer"]
    assert "pending" in lines["report"]
    assert submitted.jobs_after_again - submitted.jobs_of_others <= set(submitted.jobs.values())


def test_a_finished_run_is_submitted_as_nothing(slurm: Slurm, submitted: Submitted) -> None:
    output = slurm.smalti(
        *("submit", str(TINY), f"runs={submitted.path.parent}", STEPS),
        *("--cluster", str(submitted.path.parent / "cluster.yaml")),
    )
    assert [line.split()[-1] for line in output.splitlines()[1 : 1 + len(STAGE_NAMES)]] == ["finished"] * len(
        STAGE_NAMES
    )


def test_only_missing_array_tasks_are_submitted(slurm: Slurm, run_copy: Path) -> None:
    (run_copy / "tokenize" / "_SUCCESS").unlink()
    done = run_copy / "tokenize" / "tasks" / "1-of-3"
    done.parent.mkdir(exist_ok=True)
    done.touch()
    cluster = str(cluster_file(run_copy.parent))
    output = slurm.smalti(
        "submit", str(run_copy / "config.yaml"), "--cluster", cluster, "--only", "tokenize", "--dry-run"
    )
    assert next(line for line in output.splitlines() if line.startswith("tokenize (tasks)")).split()[2] == "0,2%2"


def test_from_a_stage_on_leaves_out_what_comes_before(slurm: Slurm, run_copy: Path) -> None:
    cluster = str(cluster_file(run_copy.parent))
    config = ["submit", str(run_copy / "config.yaml"), "--cluster", cluster, "--dry-run"]
    output = slurm.smalti(*config, "--from", "transformer")
    written = [line.split()[0] for line in output.splitlines() if "written: " in line]
    assert written == ["transformer", "generate", "generate", "evaluate", "report"]
    refused = slurm.smalti(*config, "--from", "generate", check=False)
    assert "generate needs transformer, which is neither finished nor queued" in refused


def test_jobs_run_the_code_that_was_submitted(submitted: Submitted) -> None:
    script = (submitted.path / "slurm" / "transformer.sbatch").read_text()
    code = submitted.path / "code" / "src"
    assert f"\ncode={code}\nexport PYTHONPATH=$code" in script
    assert (code / "stages" / "transformer.py").is_file()


def test_status_tells_of_a_finished_run_as_table_and_as_json(slurm: Slurm, submitted: Submitted) -> None:
    listed = {entry["stage"]: entry for entry in json.loads(slurm.smalti("status", str(submitted.path), "--json"))}
    assert list(listed) == list(STAGE_NAMES)
    assert {entry["state"] for entry in listed.values()} == {"FINISHED"}
    assert listed["transformer"]["job"] == str(submitted.jobs["transformer"])
    assert (listed["transformer"]["step"], listed["transformer"]["steps"]) == (100, 100)
    assert listed["tokenize"]["restarts"] == 1
    table = slurm.smalti("status", str(submitted.path))
    assert "100/100" in table


def test_a_job_that_dies_before_its_stage_begins_is_failed_whatever_lies_there(
    slurm: Slurm, submitted: Submitted, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(submitted.path, tmp_path / "a copy"))
    cluster = cluster_file(tmp_path, python="/nowhere/python")
    slurm.smalti("submit", str(copy), "report.title=Another", "--cluster", str(cluster))
    job = json.loads((copy / "slurm" / "jobs.json").read_text())[-1]["id"]
    assert job not in submitted.jobs.values()
    wait_until("its end", lambda: slurm.states()[job] not in ("PENDING", "RUNNING", "COMPLETING"), run=copy)
    assert (copy / "report" / "_SUCCESS").exists()
    assert slurm.states()[job] == "FAILED"
    assert slurm.job(job, "ExitCode") == "127:0"
    listed = {entry["stage"]: entry for entry in json.loads(slurm.smalti("status", str(copy), "--json"))}
    assert (listed["report"]["state"], listed["evaluate"]["state"]) == ("FAILED", "FINISHED")
    assert "/nowhere/python" in listed["report"]["failure"]


def test_logs_show_each_rank(slurm: Slurm, submitted: Submitted) -> None:
    log = slurm.smalti("logs", str(submitted.path), "transformer", "-n", "0")
    assert "preflight passed: 4 processes on node1, node2 (hosts and all-reduce, " in log
    assert "100/100" in log
    assert "shard" in slurm.smalti("logs", str(submitted.path), "tokenize", "--task", "1")


def test_the_preflight_wants_no_input_that_is_switched_off(submitted: Submitted) -> None:
    assert "reranker" in stage_named("generate").inputs
    assert "reranker" not in STAGE_NAMES
    assert check_host(submitted.path, "generate", min_free_gb=0) is None


def test_every_rendered_script_is_clean(submitted: Submitted) -> None:
    scripts = sorted((submitted.path / "slurm").glob("*.sbatch"))
    assert len(scripts) == len(STAGE_NAMES) + 2
    assert_clean(scripts)
