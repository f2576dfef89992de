"""`smalti run`: signals before a stage has begun, what runs of what is asked for, and whose code it is."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from pipeline.config.pipeline import load_pipeline
from pipeline.core.lock import Lock
from pipeline.orchestration.run_directory import RunDirectory
from pipeline.slurm.status import as_json, run_status
from tests.cli.test_main import smalti
from tests.conftest import NO_TRACKING, STAGE_NAMES, TINY
from tests.launch import ROOT, environment, launch
from tests.orchestration.recorded_run import recorded_run

LAYERS = "transformer.layers=3"


@pytest.fixture
def finished(tmp_path: Path) -> RunDirectory:
    return recorded_run(tmp_path)


def _files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_before_the_stage_has_begun_is_a_stop_and_not_the_old_result(
    finished: RunDirectory, number: signal.Signals
) -> None:
    command = [sys.executable, "-m", "pipeline", "run", str(TINY), f"runs={finished.path.parent}", LAYERS]
    process = subprocess.Popen(
        command, env=environment(), cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stderr is not None
    output = ""
    while "transformer     " not in output:
        line = process.stderr.readline()
        assert line, output
        output += line
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)  # Ctrl-C reaches all
    output += process.stderr.read()
    assert process.wait() == 75, output
    assert "transformer was stopped on request; run the same command again to resume" in output
    assert "done" not in output
    assert "Traceback" not in output


def test_status_tells_finished_from_stale(finished: RunDirectory) -> None:
    assert {status.state for status in run_status(finished)[0]} == {"FINISHED"}
    finished.open(load_pipeline(TINY, [f"runs={finished.path.parent}", LAYERS]), "tiny.yaml")
    found = {status.stage: (status.state, status.reason) for status in run_status(finished)[0]}
    assert found["tokenize"] == ("FINISHED", "")
    assert found["transformer"] == ("STALE", "transformer.layers: 2 -> 3")
    assert found["generate"] == ("STALE", "input transformer is stale")


def test_status_gives_a_metric_as_name_and_number(finished: RunDirectory) -> None:
    (finished.stage("transformer") / "metrics.jsonl").write_text('{"step": 30, "time": 1.0, "loss": 2.5}\n')
    (status,) = [status for status in run_status(finished)[0] if status.stage == "transformer"]
    assert (status.metric, status.value) == ("loss", 2.5)
    assert '"metric": "loss",\n    "value": 2.5' in as_json([status])


def test_run_takes_a_run_directory_and_a_dry_run_changes_nothing(finished: RunDirectory) -> None:
    before = _files(finished.path)
    output = launch("pipeline", "run", str(finished.path), LAYERS, "--dry-run", "--from", "tokenize")
    lines = {line.split()[0]: line for line in output.splitlines()}
    assert list(lines) == ["tokenize", "transformer", "generate", "evaluate", "report"]
    assert "up to date" in lines["tokenize"]
    assert "would run: transformer.layers: 2 -> 3" in lines["transformer"]
    assert "would run: transformer: transformer.layers: 2 -> 3" in lines["generate"]
    assert _files(finished.path) == before


def test_a_dry_run_says_what_a_branch_would_take_over(finished: RunDirectory) -> None:
    output = launch("pipeline", "run", str(finished.path), "name=second", "generate.samples=5", "--dry-run")
    lines = {line.split()[0]: line for line in output.splitlines()}
    assert all("would be taken over from" in lines[name] for name in STAGE_NAMES[:-3])
    assert all("would run" in lines[name] for name in STAGE_NAMES[-3:])
    assert not (finished.path.parent / "second").exists()


def test_run_does_one_stage_alone(finished: RunDirectory) -> None:
    output = launch("pipeline", "run", str(finished.path), "--only", "tokenize")
    assert output.split() == ["tokenize", "up", "to", "date"]
    refused = launch("pipeline", "run", str(finished.path), "--only", "tokenize", "--from", "tokenize", check=False)
    assert "expected --from or --only, found both" in refused


@pytest.mark.slow
def test_a_refused_stage_changes_nothing(finished: RunDirectory) -> None:
    before = _files(finished.path)
    output = launch("pipeline", "evaluate", "--config", str(finished.path), LAYERS, check=False)
    assert "evaluate: its inputs are out of date" in output
    assert {path: text for path, text in _files(finished.path).items() if path.parent.name != "logs"} == before


@pytest.mark.slow
def test_a_stage_takes_over_a_run_whose_config_file_was_renamed(finished: RunDirectory, tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(TINY.read_text())
    config = ["--config", str(mine), f"runs={tmp_path}"]
    assert "or pass --take-over" in launch("pipeline", "tokenize", *config, check=False)
    for stage in ("generate", "evaluate", "tokenize"):
        assert f"{stage}: up to date" in launch("pipeline", stage, *config, "--take-over")


@pytest.mark.slow
def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "thesis.tex").write_text("years of work")
    for command in (["run", str(TINY)], ["prepare", "--config", str(TINY)]):
        assert "found other files" in launch("pipeline", *command, f"runs={tmp_path}", check=False)
        assert [path.name for path in (tmp_path / "tiny").iterdir()] == ["thesis.tex"]


def test_an_empty_entry_of_pythonpath_is_not_the_current_folder() -> None:
    code = "from pipeline.orchestration.local_runner import IMPORTS_THIS_CODE as e; print(e['PYTHONPATH'])"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env=environment(PYTHONPATH=f":{ROOT}::/elsewhere:"), capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "" not in done.stdout.strip().split(":")


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("prepare.image_size=15", "prepare.image_size: expected a multiple of 4, as the image tokenizer"),
        ("transformer.training.micro_batch_size=5", "expected batch_size to be a multiple of 1 process × micro"),
        ("processes=3", "image-tokenizer: expected batch_size to be a multiple of 3 processes, found 16"),
        ("prepare.validation_fraction=0", "prepare.validation_fraction: expected more than 0"),
        (
            "transformer.caption_dropout=0 generate.sampling.guidance=3",
            "generate.sampling.guidance: expected 1 without transformer.caption_dropout, found 3",
        ),
        (f"seed={2**63}", "seed"),
        ("runs=/proc/x", "expected a run directory that can be made and written at /proc/x/tiny"),
        (f"name={'a' * 300}", "File name too long: set name="),
    ],
)
def test_what_config_alone_decides_is_told_before_the_first_stage(
    override: str, complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "c.yaml").write_text("{}")
    for command in (["run", str(TINY)], ["submit", str(TINY), "--cluster", str(tmp_path / "c.yaml")]):
        if override.startswith("processes") and command[0] == "submit":
            continue  # the cluster file says how many
        code, output = smalti(capsys, monkeypatch, *command, f"runs={tmp_path}", *override.split())
        assert code == 2
        assert output.startswith("error: ")
        assert len(output.splitlines()) == 1
        assert complaint in output
        assert not (tmp_path / "tiny").exists()


def _captioned(folder: Path, count: int) -> Path:
    folder.mkdir()
    for number in range(count):
        Image.new("RGB", (16, 16), (number * 9 % 256, 40, 90)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture {number}")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["generate.training_prompts=[a heart]"], "generate.training_prompts: expected captions of the train split"),
        (["generate.new_prompts=[picture 3]"], "generate.new_prompts: expected prompts that training never saw"),
        (["generate.samples=50"], "captions of the train split, found 50; lower it"),
        (["prepare.validation_fraction=0.000001"], "text-tokenizer: expected samples in both splits of"),
    ],
)
def test_what_data_decides_is_told_right_after_prepare(overrides: list[str], complaint: str, tmp_path: Path) -> None:
    source = f"prepare.source={{kind: folder, path: {_captioned(tmp_path / 'in', 44)}}}"
    fitting = ["generate.training_prompts=[]", "generate.new_prompts=[]", "generate.samples=8", NO_TRACKING]
    output = launch("pipeline", "run", str(TINY), f"runs={tmp_path}", source, *fitting, *overrides, check=False)
    assert complaint in output
    assert "Traceback" not in output
    assert not (tmp_path / "tiny" / "image-tokenizer").exists()


@pytest.mark.parametrize("command", [["run"], ["report", "--config"]])
def test_the_config_of_a_stage_at_work_stays(command: list[str], tiny_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(tiny_run, tmp_path / "tiny", copy_function=shutil.copy2))
    config = (run / "config.yaml").read_text()
    changed = [str(TINY), f"runs={tmp_path}", "transformer.layers=3", NO_TRACKING]
    with Lock(run / "locks" / "transformer.json", "stage transformer"):
        told = launch("pipeline", *command, *changed, check=False)
    assert (run / "config.yaml").read_text() == config
    if command == ["run"]:
        assert "stage transformer, with another config (" in told
        assert "layers: 2 -> 3" in told
        assert "is already being written by process" in told


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        (
            "generate.training_prompts=[a crooked heart]",
            "expected captions of the train split, found 'a crooked heart'",
        ),
        ("generate.sampling.top_k=9999", "generate.sampling.top_k: expected at most the 64 codes"),
    ],
)
def test_what_generate_cannot_do_is_told_before_the_transformer_trains(
    override: str, complaint: str, tiny_run: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(tiny_run, tmp_path / "tiny", copy_function=shutil.copy2))
    for stage in ("transformer", "generate", "evaluate", "report"):
        shutil.rmtree(run / stage)
    output = launch("pipeline", "run", str(TINY), f"runs={tmp_path}", override, NO_TRACKING, check=False)
    assert complaint in output
    assert not (run / "transformer" / "checkpoints").exists()
