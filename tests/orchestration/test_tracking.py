"""metrics.jsonl is always there; MLflow mirrors it, once, on an embedded database and on a server."""

from __future__ import annotations

import json
import logging
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from PIL import Image

from pipeline.config.tracking import TrackingConfig
from pipeline.orchestration.tracking import Mirror, Tracker, default_uri


def _tracker(run: Path, *, uri: str | None = None, last_stage: bool = False, flush_s: float = 30.0) -> Tracker:
    (run / "transformer").mkdir(parents=True, exist_ok=True)
    mirror = Mirror(
        TrackingConfig(uri=uri, flush_timeout_s=flush_s),
        run,
        "demo",
        "transformer",
        parameters={"transformer": {"layers": 4, "training": {"steps": 30}}},
        last_stage=last_stage,
    )
    tracker = Tracker(run / "transformer", mirror)
    tracker.start()
    return tracker


def _history(client: MlflowClient, run_id: str, metric: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in client.get_metric_history(run_id, metric)]


def _run_ids(run: Path) -> tuple[str, str]:
    return (
        json.loads((run / "mlflow.json").read_text())["run_id"],
        json.loads((run / "transformer" / "mlflow.json").read_text())["run_id"],
    )


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real `mlflow server` on loopback."""
    folder = tmp_path_factory.mktemp("server")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = ["--backend-store-uri", f"sqlite:///{folder}/db", "--artifacts-destination", str(folder / "artifacts")]
    process = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    uri = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 120
    try:
        while not _answers(f"{uri}/health"):
            assert process.poll() is None, "the server ended"
            assert time.monotonic() < deadline, "the server does not answer"
            time.sleep(0.1)
        yield uri
    finally:
        process.terminate()
        process.wait()


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=1).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize("store", ["sqlite", "server"])
@pytest.mark.slow
def test_a_resumed_stage_continues_its_own_run_and_doubles_nothing(
    store: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    uri = request.getfixturevalue("server") if store == "server" else None
    first = _tracker(tmp_path, uri=uri)
    for step in (10, 20):
        first.log({"loss": 1 / step}, step)
    first.close("KILLED")
    ids = _run_ids(tmp_path)

    second = _tracker(tmp_path, uri=uri, last_stage=True)
    second.truncate(10)  # resumed from the checkpoint of step 10: step 20 comes again
    for step in (20, 30):
        second.log({"loss": 1 / step}, step)
    second.log_image("samples", Image.new("RGB", (8, 8)), 30)
    second.close("FINISHED")

    assert _run_ids(tmp_path) == ids
    parent, child = ids
    client = MlflowClient(uri or default_uri(tmp_path))
    assert _history(client, child, "loss") == [(10, 1 / 10), (20, 1 / 20), (30, 1 / 30)]
    assert client.get_run(child).data.tags["mlflow.parentRunId"] == parent
    assert client.get_run(child).data.params["transformer.training.steps"] == "30"
    assert {client.get_run(run).info.status for run in ids} == {"FINISHED"}
    assert "system/cpu_percent" in client.get_run(child).data.metrics
    assert [a.path for a in client.list_artifacts(child, "images")] == ["images/samples-00000030.png"]
    lines = [json.loads(line) for line in (tmp_path / "transformer" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [10, 20, 30]


@pytest.mark.slow
def test_what_a_killed_process_had_not_sent_is_sent_by_the_next(tmp_path: Path) -> None:
    stage = tmp_path / "transformer"
    stage.mkdir()
    Tracker(stage, mirror=None).log({"loss": 0.5}, 10)  # written, and killed before MLflow was asked
    with open(stage / "metrics.jsonl", "a") as file:
        file.write('{"step": 20, "ti')  # killed in the middle of a line
    tracker = _tracker(tmp_path)
    tracker.truncate(10)
    tracker.log({"loss": 0.25}, 20)
    tracker.close("FINISHED")
    _, child = _run_ids(tmp_path)
    assert _history(MlflowClient(default_uri(tmp_path)), child, "loss") == [(10, 0.5), (20, 0.25)]


@pytest.mark.slow
def test_an_absent_server_delays_nothing_and_gets_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="pipeline.orchestration.tracking"):
        tracker = _tracker(tmp_path, uri="http://127.0.0.1:9", flush_s=10)  # the discard port: nobody listens
        for step in range(1000):
            tracker.log({"loss": 1.0}, step)
        tracker.close("FINISHED")
    assert len(caplog.records) == 1
    assert "continuing without it" in caplog.text
    assert len((tmp_path / "transformer" / "metrics.jsonl").read_text().splitlines()) == 1000
