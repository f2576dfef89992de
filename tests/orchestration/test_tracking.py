"""metrics.jsonl is always there; MLflow mirrors it, once, on an embedded database and on a server."""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.tracking._tracking_service.utils import _artifact_repos_cache
from PIL import Image

from pipeline.config.base import to_yaml
from pipeline.config.pipeline import load_pipeline
from pipeline.core.atomic_io import write_atomic, write_json
from pipeline.core.credentials import put_password_back
from pipeline.orchestration.mlflow_mirror import catch_up
from pipeline.orchestration.mlflow_store import default_uri, legal_name
from pipeline.orchestration.tracking import Tracker
from tests.conftest import TINY
from tests.launch import ROOT, environment
from tests.orchestration.recorded_run import recorded_run
from tests.orchestration.tracked import client_of, config_of, history, record_of, start_tracker


def _run_ids(run: Path) -> tuple[str, str]:
    return record_of(run)["run_id"], record_of(run / "transformer")["run_id"]


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
    first = start_tracker(tmp_path, uri=uri)
    for step in (10, 20):
        first.log({"loss": 1 / step}, step)
    first.close("KILLED")
    ids = _run_ids(tmp_path)

    second = start_tracker(tmp_path, uri=uri)
    second.truncate(10)  # resumed from the checkpoint of step 10: step 20 comes again
    for step in (20, 30):
        second.log({"loss": 1 / step}, step)
    second.log_image("samples", Image.new("RGB", (8, 8)), 30)
    second.close("FINISHED")

    assert _run_ids(tmp_path) == ids
    parent, child = ids
    client = MlflowClient(uri or default_uri(tmp_path))
    assert history(client, child, "loss") == [(10, 1 / 10), (20, 1 / 20), (30, 1 / 30)]
    assert client.get_run(child).data.tags["mlflow.parentRunId"] == parent
    assert client.get_run(child).data.params["transformer.training.steps"] == "30"
    assert client.get_run(child).info.status == "FINISHED"
    assert client.get_run(parent).info.status == "SCHEDULED"  # other stages are to come
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
    tracker = start_tracker(tmp_path)
    tracker.truncate(10)
    tracker.log({"loss": 0.25}, 20)
    tracker.close("FINISHED")
    _, child = _run_ids(tmp_path)
    assert history(MlflowClient(default_uri(tmp_path)), child, "loss") == [(10, 0.5), (20, 0.25)]


@pytest.mark.slow
def test_an_absent_server_delays_nothing_and_gets_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="pipeline.orchestration"):
        tracker = start_tracker(tmp_path, uri="http://127.0.0.1:9", flush_s=10)  # the discard port: nobody listens
        for step in range(1000):
            tracker.log({"loss": 1.0}, step)
        tracker.close("FINISHED")
    assert len(caplog.records) == 1
    assert "continuing without it" in caplog.text
    assert len((tmp_path / "transformer" / "metrics.jsonl").read_text().splitlines()) == 1000


@pytest.mark.slow
def test_the_parent_carries_config_commit_report_and_best_metrics(tmp_path: Path) -> None:
    run = recorded_run(tmp_path).path
    write_json(run / "code" / "version.json", {"version": "1.0", "commit": "abc123", "changed": True})
    write_atomic(run / "report" / "index.html", "the report")
    tracker = start_tracker(run)
    lower = ("val/loss/image/0", "val/bits/image_token")
    higher = ("val/psnr", "val/ssim", "val/accuracy/image", "val/reward", "val/text to image R@5")
    last = ("val/codebook_usage", "val/code_entropy_bits", "val/bits_per_pixel")  # tell how codes are used
    for step, value in enumerate((3.0, 1.5, 4.5, 2.0)):
        tracker.log({"loss": 9.0} | dict.fromkeys((*lower, *higher, *last), value), step)
    tracker.close("FINISHED")
    parent, _ = _run_ids(run)
    client = client_of(run)
    pipeline = client.get_run(parent)
    assert pipeline.data.params["transformer.layers"] == "2"
    assert pipeline.data.params["prepare.source.kind"] == "openmoji"
    assert pipeline.data.tags["mlflow.source.git.commit"] == "abc123"
    best = dict.fromkeys(lower, 1.5) | dict.fromkeys(higher, 4.5) | dict.fromkeys(last, 2.0)
    assert pipeline.data.metrics == {legal_name(f"transformer/{name}"): value for name, value in best.items()}
    assert {a.path for a in client.list_artifacts(parent)} == {"config.yaml", "report"}
    assert [a.path for a in client.list_artifacts(parent, "report")] == ["report/index.html"]
    assert pipeline.info.status == "FINISHED"


@pytest.mark.slow
def test_the_thread_imports_nothing_that_a_stage_may_import_meanwhile(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; "
        "from pipeline.orchestration.mlflow_mirror import Mirror; from pipeline.config.pipeline import load_pipeline;"
        "mirror = Mirror(load_pipeline(sys.argv[1], [f'runs={sys.argv[2]}']), 'transformer');"
        "mirror._thread.start = lambda: None; mirror.start(); before = {*sys.modules};"
        "Path(sys.argv[2], 'tiny').mkdir(); mirror.store.connect();"
        "print(*{name.split('.')[0] for name in {*sys.modules} - before})"
    )
    command = [sys.executable, "-c", program, str(TINY), str(tmp_path)]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, check=True)
    assert {*done.stdout.split()} <= {"mlflow", "alembic", "sqlalchemy"}


@pytest.mark.slow
def test_what_mlflow_could_not_take_is_sent_by_the_next_stage_that_starts(tmp_path: Path) -> None:
    stage = tmp_path / "image-tokenizer"
    stage.mkdir()
    missed = Tracker(stage, mirror=None)  # as when the server was away
    missed.start()
    missed.log({"loss": 0.5}, 10)
    missed.log_image("samples", Image.new("RGB", (8, 8)), 10)
    missed.close("FAILED")
    killed = tmp_path / "text-tokenizer"
    killed.mkdir()
    Tracker(killed, mirror=None).start()
    start_tracker(tmp_path).close("FINISHED")
    client = client_of(tmp_path)
    sent = json.loads((stage / "mlflow.json").read_text())["run_id"]
    assert history(client, sent, "loss") == [(10, 0.5)]
    assert [a.path for a in client.list_artifacts(sent, "images")] == ["images/samples-00000010.png"]
    assert client.get_run(sent).info.status == "FAILED"
    other = json.loads((killed / "mlflow.json").read_text())["run_id"]
    assert client.get_run(other).info.status == "KILLED"
    assert client.get_run(sent).data.tags["mlflow.parentRunId"] == _run_ids(tmp_path)[0]
    assert catch_up(config_of(tmp_path)) == []  # all is there


@pytest.mark.slow
def test_a_name_that_mlflow_does_not_allow_is_made_legal_and_a_refusal_is_told_as_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = start_tracker(tmp_path)
    tracker.log({"retrieval/image to text R@1": 0.25, "loss": 1.0}, 1)
    tracker.close("FINISHED")
    _, child = _run_ids(tmp_path)
    client = client_of(tmp_path)
    assert client.get_run(child).data.metrics["retrieval/image to text R at 1"] == 0.25
    assert client.get_run(child).info.status == "FINISHED"
    assert not caplog.records

    monkeypatch.setattr("pipeline.orchestration.mlflow_sender.legal_name", lambda name: name)
    tracker = start_tracker(tmp_path)
    tracker.log({"R@5": 0.5, "loss": 2.0}, 2)
    tracker.close("FINISHED")
    assert history(client, child, "loss") == [(1, 1.0), (2, 2.0)]
    assert client.get_run(child).info.status == "FINISHED"
    assert "MLflow refuses R@5" in caplog.text
    assert "not usable" not in caplog.text


@pytest.mark.slow
def test_an_artifact_that_mlflow_refuses_is_told_once_and_keeps_nothing_else_from_it(
    tmp_path: Path, server: str, caplog: pytest.LogCaptureFixture
) -> None:
    run = recorded_run(tmp_path).path
    for again in range(2):
        tracker = start_tracker(run, uri=server)
        for name in ("a%23.png", "b.png") if again == 0 else ():  # a server takes no file whose name has a #
            write_atomic(run / "transformer" / name, "an image")
            tracker.artifact(run / "transformer" / name)
        tracker.log({"loss": 1.0}, again)
        tracker.close("FINISHED")
    client, child = MlflowClient(server), record_of(run / "transformer")["run_id"]
    assert [a.path for a in client.list_artifacts(child)] == ["b.png"]
    assert sorted(history(client, child, "loss")) == [(0, 1.0), (1, 1.0)]
    assert [record.message.count("a%23.png") > 0 for record in caplog.records] == [True]


@pytest.mark.parametrize("name", ["R@1", "/x", "../../x", "a//b", "", "FD∞", "x" * 400, "a\nb", "k=5 [%]"])
def test_every_name_can_be_made_one_that_mlflow_takes(name: str) -> None:
    from mlflow.utils.validation import _validate_metric_name

    _validate_metric_name(legal_name(name))


@pytest.mark.slow
def test_two_runs_in_one_database_have_their_artifacts_beside_it_and_not_in_each_others_folder(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/all.db"
    for name in ("one", "two"):
        tracker = start_tracker(tmp_path / name, uri=uri)
        tracker.log_image("samples", Image.new("RGB", (8, 8)), 1)
        tracker.close("FINISHED")
        assert not (tmp_path / name / "mlartifacts").exists()
        _, child = _run_ids(tmp_path / name)
        assert (tmp_path / "mlartifacts" / child / "artifacts" / "images" / "samples-00000001.png").is_file()
    copied = tmp_path / "copy"
    shutil.copytree(tmp_path / "one", copied)
    start_tracker(copied, uri=uri).close("FINISHED")
    assert set(_run_ids(copied)).isdisjoint(_run_ids(tmp_path / "one"))
    shutil.move(tmp_path / "two", tmp_path / "moved")
    before = _run_ids(tmp_path / "moved")
    start_tracker(tmp_path / "moved", uri=uri).close("FINISHED")
    assert _run_ids(tmp_path / "moved") == before


@pytest.mark.slow
def test_a_copied_run_directory_writes_its_artifacts_into_itself(tmp_path: Path) -> None:
    original, copied = tmp_path / "run", tmp_path / "copy"
    tracker = start_tracker(original)
    tracker.log_image("first", Image.new("RGB", (8, 8)), 1)
    tracker.close("KILLED")
    shutil.copytree(original, copied)
    _artifact_repos_cache.clear()  # MLflow's, by run id: a process has one run directory
    before = sorted(original.rglob("*"))
    tracker = start_tracker(copied)
    tracker.log_image("second", Image.new("RGB", (8, 8)), 2)
    tracker.close("FINISHED")
    assert sorted(original.rglob("*")) == before
    _, child = _run_ids(copied)
    listed = [a.path for a in client_of(copied).list_artifacts(child, "images")]
    assert listed == ["images/first-00000001.png", "images/second-00000002.png"]
    assert len(list((copied / "mlartifacts").rglob("*.png"))) == 2


@pytest.mark.slow
def test_a_process_that_ends_while_the_database_is_made_leaves_none_that_is_half(tmp_path: Path) -> None:
    (tmp_path / ".mlflow.db.dead.tmp").write_bytes(b"half")
    with sqlite3.connect(tmp_path / "mlflow.db") as half:  # as versions before left it
        half.execute("CREATE TABLE experiments (experiment_id INTEGER)")
    half.close()
    tracker = start_tracker(tmp_path)
    tracker.log({"loss": 0.5}, 10)
    tracker.close("FINISHED")
    _, child = _run_ids(tmp_path)
    assert history(client_of(tmp_path), child, "loss") == [(10, 0.5)]
    assert not list(tmp_path.glob(".mlflow.db.*"))
    assert len(list(tmp_path.glob("mlflow.db.damaged-*"))) == 1


@pytest.mark.slow
def test_another_config_is_another_run_with_the_stages_that_it_keeps_and_nothing_of_the_others(tmp_path: Path) -> None:
    run = recorded_run(tmp_path).path
    write_atomic(run / "report" / "index.html", "of the first config")
    for stage, metrics in {"prepare": {"samples": 9.0}, "evaluate": {"FID": 12.0}}.items():
        tracker = start_tracker(run, stage=stage)
        tracker.log(metrics, 0)
        tracker.close("FINISHED")
    before = json.loads((run / "mlflow.json").read_text())["run_id"]
    with open(run / "evaluate" / "metrics.jsonl", "a") as file:  # what MLflow does not have yet
        file.write(json.dumps({"step": 1, "time": 1.0, "FID": 11.0}) + "\n")
    config = load_pipeline(run, ["transformer.layers=3"])
    assert catch_up(config) == ["evaluate"]

    after = json.loads((run / "mlflow.json").read_text())["run_id"]
    client = client_of(run)
    assert before != after
    assert client.get_run(after).data.params["transformer.layers"] == "3"
    assert client.get_run(after).data.metrics == {}
    assert [a.path for a in client.list_artifacts(after)] == ["config.yaml"]
    children = {name: record_of(run / name)["run_id"] for name in ("prepare", "evaluate")}
    parents = {name: client.get_run(child).data.tags["mlflow.parentRunId"] for name, child in children.items()}
    assert parents == {"prepare": after, "evaluate": before}
    assert sorted(history(client, children["evaluate"], "FID")) == [(0, 12.0), (1, 11.0)]


def test_a_password_in_the_uri_is_written_nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SMALTI_CREDENTIALS", "")
    config = config_of(tmp_path, uri="https://me:s3cr3t@example.org/mlflow")
    assert "s3cr3t" not in to_yaml(config) + repr(config)
    assert config.tracking.uri == "https://example.org/mlflow"
    assert put_password_back(config.tracking.uri) == "https://me:s3cr3t@example.org/mlflow"


def test_what_grows_with_the_data_is_no_artifact(tiny_run: Path) -> None:
    sent = [path for path in (tiny_run / "mlartifacts").rglob("*") if path.is_file()]
    assert {".png", ".json", ".html"} <= {path.suffix for path in sent}
    assert not [path for path in sent if path.suffix in (".npy", ".tar") or "captions" in path.name]


def test_everybody_whom_the_umask_lets_can_read_all_of_a_run(tiny_run: Path) -> None:
    umask = os.umask(0o022)
    os.umask(umask)
    secret = [p for p in tiny_run.rglob("*") if p.is_file() and p.stat().st_mode & 0o666 != 0o666 & ~umask]
    assert not secret
