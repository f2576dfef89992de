"""The whole pipeline through the real command line: from captioned images to a report."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient
from PIL import Image

from pipeline.config.pipeline import load_pipeline
from pipeline.core.atomic_io import sha256_file
from pipeline.orchestration.mlflow_store import default_uri
from tests.conftest import NO_TRACKING, STAGE_NAMES, TINY
from tests.launch import ROOT, launch


@pytest.fixture
def run_copy(tiny_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that a test may change."""
    return Path(shutil.copytree(tiny_run, tmp_path / "tiny", copy_function=shutil.copy2))


def test_every_stage_finishes_and_the_report_is_one_file(tiny_run: Path) -> None:
    assert all((tiny_run / stage / "_SUCCESS").exists() for stage in STAGE_NAMES)
    page = (tiny_run / "report" / "index.html").read_text()
    assert "OpenMoji" in page
    assert "data:image/png;base64," in page
    for name in ("prompts.png", "order.png"):
        with Image.open(tiny_run / "generate" / name) as grid:
            assert min(grid.size) > 100
    assert "The order in which an image comes" in page


def test_running_again_does_nothing(run_copy: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run_copy.glob("*/manifest.json")}
    output = launch("pipeline", "run", str(TINY), f"runs={run_copy.parent}", NO_TRACKING)
    assert output.count("up to date") == len(STAGE_NAMES)
    assert {path: path.stat().st_mtime_ns for path in run_copy.glob("*/manifest.json")} == before


def test_a_changed_key_runs_what_depends_on_it_and_says_why(run_copy: Path) -> None:
    changed = ["generate.sampling.temperature=0.5", NO_TRACKING]
    output = launch("pipeline", "run", str(TINY), f"runs={run_copy.parent}", *changed)
    lines = {
        line.split()[0]: line for line in output.splitlines() if line.split()[:1] and line.split()[0] in STAGE_NAMES
    }
    assert [name for name in STAGE_NAMES if "up to date" not in lines[name]] == ["generate", "evaluate", "report"]
    assert "generate.sampling.temperature: 1.0 -> 0.5" in lines["generate"]
    assert "input generate changed" in lines["evaluate"]


def test_a_single_stage_refuses_inputs_of_another_config(run_copy: Path) -> None:
    output = launch(
        "pipeline", "evaluate", "--config", str(TINY), f"runs={run_copy.parent}", "transformer.layers=3", check=False
    )
    assert "error: evaluate: its inputs are out of date" in output
    assert "transformer: transformer.layers: 2 -> 3" in output


def test_mlflow_has_a_parent_and_a_child_for_each_stage(tiny_run: Path) -> None:
    client = MlflowClient(default_uri(tiny_run))
    experiment = client.get_experiment_by_name("smalti")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    parent = next(run for run in runs if "mlflow.parentRunId" not in run.data.tags)
    children = {run.info.run_name: run for run in runs if run is not parent}
    assert set(children) == set(STAGE_NAMES)
    assert {run.data.tags["mlflow.parentRunId"] for run in children.values()} == {parent.info.run_id}
    assert {run.info.status for run in runs} == {"FINISHED"}
    history = client.get_metric_history(children["transformer"].info.run_id, "loss")
    logged = [json.loads(line) for line in (tiny_run / "transformer" / "metrics.jsonl").read_text().splitlines()]
    assert [m.step for m in history] == [line["step"] for line in logged if "loss" in line]
    artifacts = {a.path for a in client.list_artifacts(children["transformer"].info.run_id)}
    assert {"config.yaml", "manifest.json", "model", "images"} <= artifacts


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_config_validates_through_the_command_line(path: Path) -> None:
    resolved = launch("pipeline", "run", str(path), "--print-config")
    assert f"name: {load_pipeline(path).name}" in resolved


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (
            ["run", str(TINY), "transformer.layer=3"],
            "unknown key 'transformer.layer'; did you mean 'transformer.layers'?",
        ),
        (["run", "nowhere.yaml"], "no config at nowhere.yaml"),
        (["run", str(TINY), "prepare.source.kind=folder"], "key 'prepare.source.path' is missing"),
        (["ui", "nowhere"], "expected a run directory, found no config.yaml in nowhere"),
        (["generate", "run/transformer", "a cat"], "found a stage of one, run/transformer: give run"),
    ],
)
def test_a_user_mistake_gets_one_line_and_exit_status_2(arguments: list[str], complaint: str, tmp_path: Path) -> None:
    stage = tmp_path / "run" / "transformer"
    stage.mkdir(parents=True)
    for name in ("config.yaml", "identity.json"):
        (stage / name).write_text("{}")
    output = launch("pipeline", *arguments, cwd=tmp_path, check=False)
    assert output.startswith("error: ")
    assert len(output.splitlines()) == 1
    assert complaint in output


def test_an_export_tells_of_what_the_weights_were_made_with(run_copy: Path, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("{}")
    submit = ["submit", str(TINY), f"runs={run_copy.parent}", "--cluster", str(tmp_path / "c.yaml"), "--dry-run"]
    launch("pipeline", *submit, "transformer.layers=3")
    launch("pipeline", "export", str(run_copy), str(tmp_path / "one"))
    card = (tmp_path / "one" / "README.md").read_text()
    assert "2 layers" in card
    assert "FD" in card
    assert (tmp_path / "one" / "prompts.png").exists()

    # Weights that were made anew have none of the metrics and images of those before.
    manifest = run_copy / "transformer" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"hash": "another"}))
    (manifest.parent / "_SUCCESS").write_text(sha256_file(manifest) + "\n")
    launch("pipeline", "export", str(run_copy), str(tmp_path / "two"))
    assert "The run has not been evaluated." in (tmp_path / "two" / "README.md").read_text()
    assert not (tmp_path / "two" / "prompts.png").exists()

    config = run_copy / "config.yaml"
    config.write_text(config.read_text().replace("transformer:\n  layers: 2", "transformer:\n  layers: 3"))
    refused = launch("pipeline", "export", str(run_copy), str(tmp_path / "three"), check=False)
    assert "transformer is not finished for the run's config (transformer.layers: 2 -> 3" in refused
    assert not (tmp_path / "three").exists()
