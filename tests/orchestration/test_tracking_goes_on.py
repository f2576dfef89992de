"""What was deleted in MLflow, or what it cannot take, keeps nothing else from it."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import pytest

from pipeline.core.atomic_io import write_json
from pipeline.core.lock import Lock
from pipeline.orchestration.mlflow_mirror import Follower, catch_up
from pipeline.orchestration.tracking import Tracker
from tests.orchestration.recorded_run import recorded_run
from tests.orchestration.tracked import client_of, config_of, history, record_of, start_tracker


@pytest.mark.slow
def test_a_run_that_was_deleted_in_mlflow_is_made_anew_with_all_of_its_stages(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = recorded_run(tmp_path).path
    for stage in ("prepare", "transformer"):
        tracker = start_tracker(run, stage=stage)
        tracker.log({"loss": 0.5}, 1)
        tracker.close("FINISHED")
    kept, client = record_of(run / "prepare")["run_id"], client_of(run)
    for deleted in (run, run / "transformer"):
        client.delete_run(record_of(deleted)["run_id"])
    tracker = start_tracker(run)
    tracker.log({"loss": 0.25}, 2)
    tracker.close("FINISHED")

    assert not caplog.records
    pipeline, child = (client.get_run(record_of(made)["run_id"]) for made in (run, run / "transformer"))
    assert pipeline.info.lifecycle_stage == child.info.lifecycle_stage == "active"
    assert sorted(history(client, child.info.run_id, "loss")) == [(1, 0.5), (2, 0.25)]
    assert record_of(run / "prepare")["run_id"] == kept
    for run_id in (kept, child.info.run_id):
        assert client.get_run(run_id).data.tags["mlflow.parentRunId"] == pipeline.info.run_id


@pytest.mark.slow
def test_a_run_that_is_deleted_in_mlflow_while_its_stage_works_is_made_anew(tmp_path: Path) -> None:
    run = recorded_run(tmp_path).path
    config, client = config_of(run), client_of(run)
    tracker = Tracker(run / "transformer", mirror=None)
    tracker.start()
    with Lock(run / "locks" / "transformer.json", "transformer"):
        tracker.log({"loss": 0.5}, 1)
        follower = Follower(config)
        follower.send()
        client.delete_run(record_of(run / "transformer")["run_id"])
        tracker.log({"loss": 0.25}, 2)
        with pytest.raises(Exception, match="active"):  # `smalti ui` tells of it once, and asks again
            follower.send()
        follower.send()
    assert sorted(history(client, record_of(run / "transformer")["run_id"], "loss")) == [(1, 0.5), (2, 0.25)]


@pytest.mark.slow
def test_a_stage_that_cannot_be_sent_keeps_no_other_from_mlflow(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = recorded_run(tmp_path).path
    for stage in ("prepare", "tokenize"):
        tracker = start_tracker(run, stage=stage)
        tracker.log({"samples": 9.0}, 1)
        tracker.close("FINISHED")
    for stage in ("prepare", "tokenize"):
        Tracker(run / stage, mirror=None).log({"samples": 8.0}, 2)
    record = record_of(run / "prepare")
    write_json(run / "prepare" / "mlflow.json", record | {"artifacts": "damaged"})
    with caplog.at_level(logging.WARNING, logger="pipeline.orchestration"):
        tracker = start_tracker(run)
        tracker.log({"loss": 0.5}, 1)
        tracker.close("FINISHED")
    client = client_of(run)
    assert len(caplog.records) == 1
    assert str(run / "prepare") in caplog.text
    assert history(client, record_of(run / "transformer")["run_id"], "loss") == [(1, 0.5)]
    assert sorted(history(client, record_of(run / "tokenize")["run_id"], "samples")) == [(1, 9.0), (2, 8.0)]

    missed = Tracker(run / "generate", mirror=None)
    missed.start()
    missed.close("FINISHED")
    assert catch_up(config_of(run)) == ["generate"]
    write_json(run / "prepare" / "mlflow.json", record)
    assert catch_up(config_of(run)) == ["prepare"]


@pytest.mark.slow
def test_what_a_repeated_step_comes_to_is_what_mlflow_shows_and_equal_points_are_there_once(tmp_path: Path) -> None:
    run = recorded_run(tmp_path).path
    first = start_tracker(run)
    for step in (10, 20, 30):
        first.log({"loss": 9.0, "val/loss": 1 / step, "worst": math.inf, "none": math.nan, "mfu": step / 100}, step)
    first.close("KILLED")
    for again in range(2):
        second = start_tracker(run)
        second.truncate(10)
        second.log({"loss": 9.0, "val/loss": 0.5, "worst": math.inf, "none": math.nan, "mfu": 0.7}, 20)  # amended
        second.log({"loss": 9.0, "val/loss": 0.25, "worst": math.inf, "none": math.nan, "mfu": 0.7}, 30)
        second.close("FINISHED" if again else "KILLED")

    client, child = client_of(run), record_of(run / "transformer")["run_id"]
    assert client.get_run(child).data.metrics["val/loss"] == 0.25
    points = sorted(client.get_metric_history(child, "val/loss"), key=lambda metric: (metric.step, metric.timestamp))
    assert [(m.step, m.value) for m in points] == [(10, 0.1), (20, 0.05), (20, 0.5), (30, 1 / 30), (30, 0.25)]
    for name in ("loss", "worst", "none", "mfu"):
        assert sorted(step for step, _ in history(client, child, name)) == [10, 20, 30]


@pytest.mark.slow
def test_a_stage_that_is_done_again_in_place_shows_its_new_metrics(tmp_path: Path) -> None:
    run = recorded_run(tmp_path).path
    for samples in (100.0, 200.0):  # its source grew
        tracker = start_tracker(run, stage="prepare")
        tracker.log({"samples": samples}, 0)
        tracker.close("FINISHED")
    start_tracker(run).close("FINISHED")  # looks at all of metrics.jsonl once more
    client, child = client_of(run), record_of(run / "prepare")["run_id"]
    assert client.get_run(child).data.metrics["samples"] == 200
    assert sorted(history(client, child, "samples")) == [(0, 100), (0, 200)]
