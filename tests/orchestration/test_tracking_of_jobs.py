"""MLflow's database of a run of Slurm's jobs has one writer: the last stage, or `smalti ui` while others work."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipeline.config.pipeline import PipelineConfig, load_pipeline
from pipeline.core.lock import Lock
from pipeline.orchestration.environment import SUBMITTED_VARIABLE
from pipeline.orchestration.mlflow_mirror import Follower
from pipeline.orchestration.mlflow_store import default_uri
from tests.launch import launch


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    """A copy of the tiny run of which MLflow knows nothing, without its last two stages."""
    copy = tmp_path / "runs" / "tiny"
    shutil.copytree(tiny_run, copy, ignore=shutil.ignore_patterns("mlflow.json", "mlflow.db", "mlartifacts", "report"))
    (copy / "evaluate" / "_SUCCESS").unlink()
    return copy


def statuses(run: Path) -> dict[str, str]:
    """Of the stages' runs in MLflow, by name."""
    client = MlflowClient(default_uri(run))
    found = client.search_runs([e.experiment_id for e in client.search_experiments()])
    return {one.info.run_name: one.info.status for one in found if "mlflow.parentRunId" in one.data.tags}


@pytest.mark.slow
def test_a_job_leaves_the_database_alone_and_that_of_the_last_stage_sends_every_stage(run: Path) -> None:
    job = {SUBMITTED_VARIABLE: "1", "SLURM_JOB_ID": "7"}
    launch("stages.evaluate", "--config", str(run / "config.yaml"), cwd=run.parent.parent, **job)
    assert (run / "evaluate" / "_SUCCESS").exists()
    assert not (run / "mlflow.db").exists()
    launch("stages.report", "--config", str(run / "config.yaml"), cwd=run.parent.parent, **job)
    found = statuses(run)
    assert found == dict.fromkeys(
        ["prepare", "text-tokenizer", "image-tokenizer", "tokenize", "transformer", "generate", "evaluate", "report"],
        "FINISHED",
    )


@pytest.mark.slow
def test_what_a_job_writes_is_sent_while_it_works_once(run: Path) -> None:
    config: PipelineConfig = load_pipeline(run / "config.yaml")
    metrics = run / "transformer" / "metrics.jsonl"
    (run / "transformer" / "_SUCCESS").unlink()
    events = run / "transformer" / "tracking.jsonl"
    with open(events, "a") as file:
        file.write('{"started": 1.0, "mirrored": false}\n')
    with Lock(run / "locks" / "transformer.json", "transformer"):
        follower = Follower(config)
        follower.send()
        for step in (31, 32):
            with open(metrics, "a") as file:
                file.write(json.dumps({"step": step, "time": 1.0, "loss": 1 / step}) + "\n")
            follower.send()
            follower.send()
        assert statuses(run)["transformer"] == "RUNNING"
    client = MlflowClient(default_uri(run))
    record = json.loads((run / "transformer" / "mlflow.json").read_text())
    history = sorted((m.step, m.value) for m in client.get_metric_history(record["run_id"], "loss"))
    assert history[-2:] == [(31, 1 / 31), (32, 1 / 32)]
    assert len(history) == len(set(history))
    follower.send()
    assert statuses(run)["transformer"] != "RUNNING"

    with Lock(run / "locks" / "transformer.json", "transformer"):
        with open(events, "a") as file:
            file.write('{"started": 2.0, "mirrored": true}\n')  # a process that sends its own
        with open(metrics, "a") as file:
            file.write(json.dumps({"step": 33, "time": 1.0, "loss": 1.0}) + "\n")
        follower.send()
    assert max(m.step for m in client.get_metric_history(record["run_id"], "loss")) == 32
