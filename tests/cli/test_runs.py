"""`smalti runs`: what is there, what may be deleted, and two runs side by side."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from pipeline.cli.runs import runs
from pipeline.core.lock import Lock
from pipeline.orchestration import disk_usage, run_directory
from pipeline.orchestration.graph import stage_named
from pipeline.report.numbers import size
from tests.conftest import STAGE_NAMES, TINY
from tests.launch import command, environment, launch
from tests.orchestration.recorded_run import recorded_run


@pytest.fixture
def folder(tiny_run: Path, tmp_path: Path) -> Path:
    """A folder with the finished tiny run and a copy of it that another guidance has made stale."""
    runs = tmp_path / "runs"
    for name in ("tiny", "other"):
        shutil.copytree(tiny_run, runs / name)
    config = runs / "other" / "config.yaml"
    loaded = yaml.safe_load(config.read_text())
    loaded["generate"]["sampling"]["temperature"] = 0.5
    config.write_text(yaml.safe_dump(loaded))
    return runs


def smalti(folder: Path, *arguments: str) -> str:
    return launch("pipeline", "runs", *arguments, cwd=folder.parent)


def test_every_run_is_listed_with_its_state_its_metrics_and_its_size(folder: Path) -> None:
    (folder / "notes").mkdir()  # no run
    shutil.copytree(
        folder / "tiny",
        folder / "begun",
        ignore=shutil.ignore_patterns("transformer", "generate", "evaluate", "report"),
    )
    (folder / "later").mkdir()
    (folder / "later" / "config.yaml").write_text("[")
    (folder / "later" / "run.json").write_text("{}")
    with Lock(folder / "begun" / "locks" / "transformer.json", "transformer"):
        found = {line["run"]: line for line in json.loads(smalti(folder, "--json"))}
    assert {name: line["state"] for name, line in found.items()} == {
        "begun": "RUNNING", "later": "UNREADABLE", "other": "STALE", "tiny": "FINISHED",
    }  # fmt: skip
    assert found["begun"]["stage"] == "transformer"
    assert "FD (Lite0)" in found["tiny"]["metrics"]
    assert "val/bits/image_token" in found["tiny"]["metrics"]
    assert found["tiny"]["size"].endswith("MB")


def test_the_list_looks_at_no_file_that_a_finished_stage_has_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = recorded_run(tmp_path / "runs")
    folder = run.stage("prepare") / "train"
    folder.mkdir()
    for number in range(9):
        (folder / f"{number}.tar").write_bytes(b"x" * 5000)
    run.finish(stage_named("prepare"), {folder: None, run.stage("prepare") / "output.txt": None})
    for stage in STAGE_NAMES[1:]:
        begun = json.loads((run.stage(stage) / "identity.json").read_text())
        begun["inputs"] = {name: run.manifest(name)["hash"] for name in begun["inputs"]}  # type: ignore[index]
        (run.stage(stage) / "identity.json").write_text(json.dumps(begun))
        run.finish(stage_named(stage), {run.stage(stage) / "output.txt": None})
    exact = disk_usage.size_of([run.path])
    asked: list[Path] = []
    monkeypatch.setattr(run_directory, "first_fault", lambda *_, **__: pytest.fail("it looks at the files"))
    entries = disk_usage._entries

    def noted(path: Path) -> Iterator[os.stat_result]:
        asked.append(path)
        yield from entries(path)

    monkeypatch.setattr(disk_usage, "_entries", noted)
    assert disk_usage.size_of_run(run) == (exact, False)
    (line,) = json.loads(CliRunner().invoke(runs, ["--in", str(run.path.parent), "--json"]).output)
    assert (line["state"], line["size"]) == ("FINISHED", size(exact))
    manifests = {stage: run.manifest(stage) for stage in STAGE_NAMES}
    outputs = {run.stage(stage) / name for stage, made in manifests.items() if made for name in made["outputs"]}
    assert len(outputs) == len(STAGE_NAMES) + 1
    assert not (outputs | set(folder.iterdir())) & set(asked)


def test_the_size_of_a_folder_that_a_stage_is_filling_is_an_estimate_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = recorded_run(tmp_path / "runs")
    (run.stage("tokenize") / "_SUCCESS").unlink()
    for number in range(300):
        (run.stage("tokenize") / f"{number}.npy").write_bytes(b"x" * 10_000)
    exact = disk_usage.size_of([run.path])
    assert disk_usage.size_of_run(run) == (exact, False)
    monkeypatch.setattr(disk_usage, "_ASKED_AT_MOST", 100)
    estimate, estimated = disk_usage.size_of_run(run)
    assert estimated
    assert abs(estimate - exact) < 0.05 * exact


def test_what_may_go_is_named_and_goes_and_what_the_run_needs_stays(folder: Path) -> None:
    run = folder / "tiny"
    old = run / "superseded" / "generate-0123456789ab"
    old.mkdir(parents=True)
    (old / "image.png").write_bytes(b"x" * 5000)
    copy = run / "mlartifacts" / "1" / "artifacts" / "train"
    copy.mkdir(parents=True)
    (copy / "000000.codes.0.npy").write_bytes(b"x" * 7000)
    (copy / "000000.png").write_bytes(b"x")
    listed = smalti(folder, "--disk")
    for path in (old, run / "transformer" / "checkpoints", run / "mlartifacts"):
        assert str(path.relative_to(folder.parent)) in listed
    assert old.is_dir()
    with Lock(folder / "other" / "locks" / "transformer.json", "transformer"):
        told = smalti(folder, "--prune", "--yes")
    assert "left alone, since a process is at work there: other" in told
    assert not old.exists()
    assert not (run / "transformer" / "checkpoints").exists()
    assert [path.name for path in copy.iterdir()] == ["000000.png"]
    assert (folder / "other" / "transformer" / "checkpoints").is_dir()
    again = launch("pipeline", "run", str(run), "--dry-run", cwd=folder.parent)
    assert "up to date" in again
    assert "would run" not in again


def test_what_a_deletion_has_left_goes_and_an_export_stays_and_is_named(tmp_path: Path) -> None:
    folder = recorded_run(tmp_path / "runs").path.parent
    training = folder / "tiny" / "transformer"
    left = [
        training / "checkpoints" / "step-00000010.1f2e3d4c.trash",  # by a training that was killed
        training / ".trash-checkpoints",  # by a --prune that was killed
        folder / "tiny" / "superseded" / ".trash-generate-0123456789ab",
        folder / ".cache" / ".trash-features",
    ]
    export = training / "exported" / "step-00000030"
    usable = training / "checkpoints" / "step-00000010"
    for path in (*left, export, usable):
        path.mkdir(parents=True)
        (path / "weights").write_bytes(b"x" * 5000)
    (training / "_SUCCESS").unlink()  # not finished: its checkpoints stay
    listed = smalti(folder, "--disk")
    assert [listed.count(f"{path.relative_to(folder.parent)} ") for path in (*left, export)] == [1] * 5
    told = smalti(folder, "--prune", "--yes")
    assert f"kept, since somebody asked for it: {export.relative_to(folder.parent)} (5" in told
    assert "deleted\n" in told
    assert [path for path in left if path.exists()] == []
    assert (export / "weights").is_file()
    assert (usable / "weights").is_file()


def test_without_yes_nothing_is_deleted(folder: Path) -> None:
    launch("pipeline", "runs", "--prune", cwd=folder.parent, check=False)  # stdin is no terminal, and says nothing
    assert (folder / "tiny" / "transformer" / "checkpoints").is_dir()


def test_a_run_that_begins_while_the_question_waits_for_its_answer_is_left_alone(folder: Path) -> None:
    asking = subprocess.Popen(
        command("pipeline", ("runs", "--prune"), 1),
        env=environment(), cwd=folder.parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert asking.stdin
    assert asking.stdout
    asked = b""
    while b"delete all of this?" not in asked:
        asked += asking.stdout.read1()  # type: ignore[attr-defined]
    with Lock(folder / "tiny" / "locks" / "transformer.json", "transformer"):
        told = asking.communicate(b"y\n")[0].decode()
    assert "tiny/transformer/checkpoints stays: a process is at work in tiny now" in told
    assert (folder / "tiny" / "transformer" / "checkpoints").is_dir()
    assert not (folder / "other" / "transformer" / "checkpoints").exists()


def test_the_checkpoints_of_a_training_that_is_to_get_more_steps_stay(folder: Path) -> None:
    config = folder / "tiny" / "config.yaml"
    loaded = yaml.safe_load(config.read_text())
    loaded["transformer"]["training"]["steps"] += 10
    config.write_text(yaml.safe_dump(loaded))
    told = smalti(folder, "--prune", "--yes")
    assert "tiny/image-tokenizer/checkpoints" in told
    assert (folder / "tiny" / "transformer" / "checkpoints").is_dir()


def finished_with(run: Path, first_row: dict[str, float], **evaluate: int) -> None:
    """As if the run had another Fréchet distance, its first metric, and keys that change no results."""
    metrics, config = run / "evaluate" / "metrics.json", run / "config.yaml"
    results, loaded = json.loads(metrics.read_text()), yaml.safe_load(config.read_text())
    results["rows"][0] |= first_row
    os.unlink(metrics)  # a hard link, perhaps
    metrics.write_text(json.dumps(results))
    loaded["generate"]["sampling"]["temperature"] = 1.0
    loaded["evaluate"] |= evaluate
    config.write_text(yaml.safe_dump(loaded))


def test_two_runs_are_compared_by_keys_metrics_and_images(folder: Path) -> None:
    finished_with(folder / "other", {"value": 0.0}, batch_size=7)
    told = smalti(folder, "compare", str(folder / "tiny"), str(folder / "other"), "-o", "page.html")
    assert "evaluate.batch_size: 64 -> 7" in told
    better = next(line for line in told.splitlines() if line.startswith("FD (Lite0), generated"))
    assert better.endswith("*")
    page = (folder.parent / "page.html").read_text()
    assert "evaluate.batch_size: 64 -&gt; 7" in page
    prompts = json.loads((folder / "tiny" / "generate" / "prompts.json").read_text())
    assert page.count("data:image/png") == 2 * len(prompts)


@pytest.mark.parametrize("number", ["n_generated", "n_real"])
def test_metrics_of_sets_of_other_sizes_are_not_called_better(folder: Path, number: str) -> None:
    finished_with(folder / "other", {"value": 0.0, number: 50_000})
    told = smalti(folder, "compare", str(folder / "tiny"), str(folder / "other"))
    lines = [
        line for line in told.splitlines() if line.startswith("FD (Lite0), generated, real images of the same captions")
    ]
    assert len(lines) == 2
    assert "*" not in "".join(lines)
    assert all("–" in line for line in lines)
    assert "n = 32 " in lines[0]
    assert "50,000" in lines[1]


def test_results_of_another_config_are_left_out_of_a_comparison_which_says_so(folder: Path) -> None:
    shutil.rmtree(folder / "tiny" / "tokenize")  # of a run elsewhere; what is not here says nothing
    told = smalti(folder, "compare", str(folder / "tiny"), str(folder / "other"), "-o", "page.html")
    assert "generate.sampling.temperature: 1.0 -> 0.5" in told
    page = (folder.parent / "page.html").read_text()
    for stage in ("evaluate", "generate"):
        why = f"{folder / 'other'}: what {stage} left is of another config or unfinished"
        assert sum(line.startswith(why) for line in told.splitlines()) == 1
        assert why in page
    assert f"{folder / 'tiny'}: what" not in told
    row = next(line for line in told.splitlines() if line.startswith("FD (Lite0), generated"))
    assert row.endswith("–")
    assert "*" not in row
    prompts = json.loads((folder / "tiny" / "generate" / "prompts.json").read_text())
    assert page.count("data:image/png") == len(prompts)
    (folder / "tiny" / "evaluate" / "_SUCCESS").unlink()
    assert "evaluate: not finished" in smalti(folder, "compare", str(folder / "tiny"), str(folder / "other"))


@pytest.mark.parametrize("closed", [".", "config.yaml", "locks", "locks/transformer.json", "transformer"])
def test_a_run_that_others_may_not_read_hides_no_other_and_nothing_of_it_is_deleted(
    closed: str, tmp_path: Path
) -> None:
    folder = tmp_path / "runs"
    for name in ("alice", "mine"):
        (folder / name / "superseded" / "prepare-1").mkdir(parents=True)
        (folder / name / "transformer" / "checkpoints").mkdir(parents=True)
        (folder / name / "locks").mkdir()
        shutil.copy(TINY, folder / name / "config.yaml")
        (folder / name / "run.json").write_text('{"source": "tiny.yaml", "format": 1}')
    (folder / "alice" / "locks" / "transformer.json").write_text("{}")
    os.utime(folder / "alice" / "locks" / "transformer.json", (0, 0))
    (folder / ".cache" / "features").mkdir(parents=True)
    (folder / "alice" / closed).chmod(0)
    # What root may do beside the modes of files, this process may not.
    drop = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"] if os.geteuid() == 0 else []

    def said(*arguments: str) -> str:
        done = subprocess.run(
            [*drop, *command("pipeline", ["runs", *arguments])],
            env=environment(), cwd=tmp_path, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    try:
        listed = {line.split()[0]: line.split()[1] for line in said().splitlines()[1:]}
        assert listed["mine"] == "STOPPED"
        assert listed["alice"] == "UNREADABLE"
        pruned = said("--prune", "--yes")
    finally:
        (folder / "alice" / closed).chmod(0o755)
    assert not list((folder / "mine" / "superseded").iterdir())
    assert "left alone, since it cannot be read (Permission denied): alice" in pruned
    assert list((folder / "alice" / "superseded").iterdir())
    assert (folder / ".cache" / "features").is_dir()  # somebody may be at work in that run


def test_a_folder_without_runs_is_told_in_one_line(tmp_path: Path) -> None:
    assert "expected a folder of runs, found none at nowhere" in launch(
        "pipeline", "runs", "--in", "nowhere", cwd=tmp_path, check=False
    )
    (tmp_path / "empty").mkdir()
    assert "no runs in empty" in launch("pipeline", "runs", "--in", "empty", cwd=tmp_path)
