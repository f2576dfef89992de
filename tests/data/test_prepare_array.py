"""prepare as array tasks and a join: the same bytes as in one process, and a source that grew is shared out again."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from PIL import Image

import pipeline.cli  # registers what prepare reads from outside  # noqa: F401
from pipeline.config.pipeline import PipelineConfig, load_pipeline
from pipeline.orchestration import stage_run
from pipeline.orchestration.graph import stage_named
from pipeline.orchestration.run_directory import RunDirectory
from pipeline.slurm.cluster import ClusterConfig, Resources
from pipeline.slurm.submit import make_plan
from pipeline.slurm.supervisor.record import progress
from stages import prepare as stage
from tests.conftest import TINY
from tests.data.sample_images import write_folder
from tests.launch import environment

PREPARE = stage_named("prepare")
# A worker process of its own, without the seconds that a stage's imports take.
SHARE = """
import sys
from pathlib import Path
from pipeline.config.pipeline import load_pipeline
from pipeline.data.prepare import prepare_share
config = load_pipeline(sys.argv[1])
prepare_share(config.run_directory / "prepare", config.prepare, config.seed, lambda parts: parts[0::2])
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty, of which two look like others of other parts."""
    folder = write_folder(tmp_path_factory.mktemp("images") / "in", 60)
    for number, same in ((31, 2), (57, 44)):
        (folder / f"{number:05d}.png").write_bytes((folder / f"{same:05d}.png").read_bytes())
    return folder


def _config(images: Path, runs: Path, shard_size: int = 5) -> PipelineConfig:
    source = json.dumps({"kind": "folder", "path": str(images)})
    values = {"shard_size": shard_size, "image_size": 16, "workers": 1, "validation_fraction": 0.2}
    overrides = [f"prepare.{name}={value}" for name, value in values.items()]
    overrides += [f"runs={runs}", f"prepare.source={source}", "prepare.filters.near_duplicate_bits=2"]
    config = load_pipeline(TINY, [*overrides, "tracking.enabled=false"])
    RunDirectory(config.run_directory).open(config, "tiny.yaml")
    return config


@pytest.fixture(scope="module", autouse=True)
def _opened_already() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SMALTI_SUBMITTED", "1")
        yield


def _run(config: PipelineConfig, task: tuple[int, int] | None = None) -> None:
    stage_run.execute(PREPARE, config, "tiny.yaml", task, stage.main)


def _outputs(config: PipelineConfig) -> tuple[str, Mapping[str, object]]:
    manifest = RunDirectory(config.run_directory).manifest("prepare")
    assert manifest is not None
    return manifest["hash"], manifest["outputs"]


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Mapping[str, object]]:
    """What the stage makes as one process."""
    config = _config(images, tmp_path_factory.mktemp("whole"))
    _run(config)
    index = json.loads((config.run_directory / "prepare" / "index.json").read_text())
    assert index["rejected"]["reasons"] == {"near-duplicate": 2}
    return _outputs(config)


@pytest.mark.parametrize("tasks", [1, 3, 14])
def test_an_array_of_any_size_and_its_join_make_the_bytes_of_one_process(
    tasks: int, images: Path, whole: tuple[str, Mapping[str, object]], tmp_path: Path
) -> None:
    config = _config(images, tmp_path)
    directory = config.run_directory / "prepare"
    for task in reversed(range(tasks)):
        _run(config, (task, tasks))
        if task == tasks - 1:
            assert len(list(directory.glob("parts/*.json"))) == len(range(12)[task::tasks])  # its own alone
        assert progress(directory, False, (task, tasks)) == len(range(12)[task::tasks])  # as its supervisor sees it
    made = {path: path.stat().st_mtime_ns for path in sorted(directory.glob("parts/*.hashes.npy"))}
    assert len(made) == 12
    assert not (directory / "index.json").exists()
    _run(config)
    assert _outputs(config) == whole
    assert {path: path.stat().st_mtime_ns for path in made} == made  # the join makes no part again


def test_a_killed_task_runs_again_and_does_only_what_is_left(
    images: Path, whole: tuple[str, Mapping[str, object]], tmp_path: Path
) -> None:
    config = _config(images, tmp_path)
    _run(config, (1, 2))
    directory = config.run_directory / "prepare"
    (tmp_path / "share.py").write_text(SHARE)
    command = [sys.executable, str(tmp_path / "share.py"), str(config.run_directory / "config.yaml")]
    child = subprocess.Popen(command, env=environment())
    deadline = time.monotonic() + 60
    while not (done := sorted(directory.glob("parts/00000[02468].json"))):
        assert child.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.001)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    made = {path: path.stat().st_mtime_ns for path in done}
    _run(config, (0, 2))
    assert {path: path.stat().st_mtime_ns for path in made} == made
    _run(config)
    assert _outputs(config) == whole


def test_a_source_of_fewer_parts_than_tasks_leaves_the_others_nothing_and_says_so(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = _config(images, tmp_path, shard_size=100)
    with caplog.at_level("INFO"):
        _run(config, (1, 2))
    assert "the source has 1 part, which another task makes: nothing to do here" in caplog.text
    _run(config, (0, 2))
    assert [path.name for path in (config.run_directory / "prepare/parts").glob("*.json")] == ["000000.json"]


def test_a_source_that_grew_is_shared_out_again(tmp_path: Path) -> None:
    images = write_folder(tmp_path / "in", 20)
    config = _config(images, tmp_path)
    runs = RunDirectory(config.run_directory)
    for task in ((0, 2), (1, 2), None):
        _run(config, task)
    before = {path: path.stat().st_mtime_ns for path in runs.stage("prepare").glob("parts/*.json")}
    write_folder(images, 10, start=20)
    cluster = ClusterConfig(stages={"prepare": Resources(array=2)})
    plan = make_plan(config, runs, cluster, [], {"prepare"})
    assert [(job.stage.name, job.array) for job in plan[:2]] == [("prepare", "0-1"), ("prepare", None)]
    _run(config, (1, 2))
    assert runs.missing_tasks(config, PREPARE, 2) == [0]
    _run(config, (0, 2))
    after = {path: path.stat().st_mtime_ns for path in runs.stage("prepare").glob("parts/*.json")}
    assert len(after) == 6
    assert before.items() <= after.items()
    _run(config)
    assert not runs.outside_changes(config, PREPARE)
    with Image.open(runs.stage("prepare") / "contact-sheet.png") as sheet:
        assert sheet.size
