"""The run directory: what is up to date, what must run again and why, and that nothing is lost on the way."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config.pipeline import PipelineConfig, load_pipeline
from pipeline.core.errors import UserError
from pipeline.orchestration.graph import stage_named, stages_of
from pipeline.orchestration.run_directory import RunDirectory
from pipeline.orchestration.run_record import source_name
from tests.conftest import STAGE_NAMES, TINY
from tests.launch import environment


def _config(tmp_path: Path, *overrides: str) -> PipelineConfig:
    return load_pipeline(TINY, [f"runs={tmp_path}", *overrides])


def _finish(runs: RunDirectory, config: PipelineConfig, name: str, content: str) -> None:
    """What a stage process does around its work, whose result is one file."""
    stage = stage_named(name)
    if runs.begin(config, stage):
        output = runs.stage(name) / "output.txt"
        output.write_text(content)
        runs.finish(stage, {output: None})


@pytest.fixture
def config(tmp_path: Path) -> PipelineConfig:
    return _config(tmp_path)


@pytest.fixture
def runs(config: PipelineConfig) -> RunDirectory:
    """A run of which every stage is finished."""
    runs = RunDirectory(config.run_directory)
    runs.check("tiny.yaml")
    runs.open(config, "tiny.yaml")
    for name in STAGE_NAMES:
        _finish(runs, config, name, f"made by {name}")
    return runs


def _outdated(runs: RunDirectory, config: PipelineConfig) -> dict[str, list[str]]:
    reasons = {stage.name: runs.stale_reasons(config, stage) for stage in stages_of(config)}
    return {name: why for name, why in reasons.items() if why}


def test_a_finished_run_is_up_to_date(runs: RunDirectory, config: PipelineConfig) -> None:
    assert _outdated(runs, config) == {}


def test_a_changed_key_is_named_and_outdates_its_stage(runs: RunDirectory, tmp_path: Path) -> None:
    changed = _config(tmp_path, "transformer.layers=3")
    assert _outdated(runs, changed) == {"transformer": ["transformer.layers: 2 -> 3"]}


def test_dependents_run_again_only_if_the_input_came_out_different(runs: RunDirectory, tmp_path: Path) -> None:
    changed = _config(tmp_path, "transformer.layers=3")
    _finish(runs, changed, "transformer", "other weights")
    why = ["input transformer changed"]
    assert _outdated(runs, changed) == {"generate": why, "evaluate": why, "report": why}


def test_a_stage_that_is_switched_on_is_a_new_input_of_what_reads_it(runs: RunDirectory, tmp_path: Path) -> None:
    why = ["input reranker is new"]
    switched_on = _outdated(runs, _config(tmp_path, "reranker.enabled=true"))
    assert switched_on == {"reranker": ["not run yet"], "generate": why, "report": why}


def test_operational_keys_outdate_nothing(runs: RunDirectory, tmp_path: Path) -> None:
    assert _outdated(runs, _config(tmp_path, "transformer.training.log_every=7", "processes=2")) == {}


def test_what_another_config_made_is_set_aside_and_comes_back_with_it(
    runs: RunDirectory, config: PipelineConfig, tmp_path: Path
) -> None:
    _finish(runs, _config(tmp_path, "transformer.layers=3"), "transformer", "other weights")
    assert len(list((runs.path / "superseded").glob("transformer-*/output.txt"))) == 1
    assert not runs.begin(config, stage_named("transformer"))
    assert (runs.stage("transformer") / "output.txt").read_text() == "made by transformer"


def test_an_unfinished_stage_of_the_same_config_keeps_what_it_has(runs: RunDirectory, config: PipelineConfig) -> None:
    (runs.stage("transformer") / "_SUCCESS").unlink()
    checkpoint = runs.stage("transformer") / "checkpoints" / "step-00000010"
    checkpoint.mkdir(parents=True)
    assert runs.begin(config, stage_named("transformer"))
    assert checkpoint.exists()


@pytest.mark.parametrize("damage", ["deleted", "cut short"])
def test_a_stage_refuses_an_input_that_is_not_as_it_was_written(
    runs: RunDirectory, config: PipelineConfig, damage: str
) -> None:
    output = runs.stage("tokenize") / "output.txt"
    if damage == "deleted":
        output.unlink()
    else:
        os.truncate(output, 3)
    with pytest.raises(UserError, match=r"transformer: .*output.txt: expected \d+ bytes, found "):
        runs.identity(config, stage_named("transformer"))
    assert list(_outdated(runs, config)) == ["tokenize"]


def test_an_unfinished_input_is_named(runs: RunDirectory, config: PipelineConfig) -> None:
    (runs.stage("tokenize") / "_SUCCESS").unlink()
    with pytest.raises(UserError, match="transformer needs tokenize, which is not finished"):
        runs.identity(config, stage_named("transformer"))


def test_inputs_of_another_config_are_seen_from_further_down(runs: RunDirectory, tmp_path: Path) -> None:
    changed = _config(tmp_path, "prepare.image_size=32")
    reasons = runs.stale_inputs(changed, stage_named("transformer"))
    assert reasons == ["prepare: prepare.image_size: 16 -> 32"]


def test_a_directory_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    config = _config(tmp_path)
    config.run_directory.mkdir()
    (config.run_directory / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="expected an empty or a Smalti run directory at .*tiny, found other files"):
        RunDirectory(config.run_directory).check("tiny.yaml")
    assert [path.name for path in config.run_directory.iterdir()] == ["thesis.tex"]


def test_the_run_of_another_config_file_is_refused_unless_taken_over(runs: RunDirectory) -> None:
    with pytest.raises(UserError, match=r"holds the run of tiny.yaml, found another config, mine.yaml"):
        runs.check("mine.yaml")
    runs.check("mine.yaml", take_over=True)


def test_the_hash_of_a_result_does_not_depend_on_when_or_where_it_was_made(
    runs: RunDirectory, config: PipelineConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        again = RunDirectory(tmp_path / "elsewhere")
        again.open(config, "tiny.yaml")
        for name in STAGE_NAMES:
            _finish(again, config, name, f"made by {name}")
    assert [again.manifest(n) and again.manifest(n)["hash"] for n in STAGE_NAMES] == [  # type: ignore[index]
        runs.manifest(n)["hash"]
        for n in STAGE_NAMES  # type: ignore[index]
    ]


def test_the_command_line_reads_configs_without_importing_torch() -> None:
    code = (
        "import sys, pipeline.cli.main, pipeline.orchestration.local_runner;"
        "print(sorted({'torch', 'mlflow', 'deepspeed'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_run_is_found_where_it_lies_whatever_it_is_called(runs: RunDirectory, tmp_path: Path) -> None:
    for name in ("renamed", "no name: (of a run)", "again"):
        moved = runs.path.rename(tmp_path / name)
        config = load_pipeline(moved / "config.yaml")
        assert config.run_directory == moved
        runs = RunDirectory(config.run_directory)
        runs.check(source_name(str(moved / "config.yaml")))
        runs.open(config, "tiny.yaml")
        assert _outdated(runs, config) == {}


def test_a_config_in_the_current_folder_means_this_run(runs: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs.path)
    for path in ("config.yaml", ".", str(runs.path)):
        assert load_pipeline(path).run_directory.resolve() == runs.path


def test_a_new_name_branches_a_run_off_with_what_stays_the_same(runs: RunDirectory, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in runs.path.rglob("*") if path.is_file()}
    (runs.stage("prepare") / "mlflow.json").write_text("{}")
    second = load_pipeline(runs.path, ["name=second", "generate.samples=5"])
    branch = RunDirectory(second.run_directory)
    branch.check(source_name(str(runs.path)))
    branch.open(second, "tiny.yaml")
    assert branch.path == tmp_path / "second"
    assert list(_outdated(branch, second)) == ["generate", "evaluate", "report"]
    assert _outdated(branch, second)["generate"] == ["not run yet"]
    assert not (branch.stage("prepare") / "mlflow.json").exists()
    assert {path: path.read_bytes() for path in before} == before
    assert load_pipeline(branch.path).name == "second"


def test_other_runs_branches_off_too(runs: RunDirectory, tmp_path: Path) -> None:
    elsewhere = load_pipeline(runs.path / "config.yaml", [f"runs={tmp_path / 'elsewhere'}"])
    assert elsewhere.run_directory == tmp_path / "elsewhere" / "tiny"
    RunDirectory(elsewhere.run_directory).open(elsewhere, "tiny.yaml")
    assert list(_outdated(RunDirectory(elsewhere.run_directory), elsewhere)) == ["report"]


def test_a_run_of_an_older_version_with_a_key_that_is_gone_is_read_with_one_warning(
    runs: RunDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    path = runs.path / "config.yaml"
    text = path.read_text().replace("kind: dvae", "kind: dvae\n    gone: 3")
    path.write_text(text.replace("transformer:\n", "transformer:\n  also_gone: {a: 1}\n"))
    config = load_pipeline(path)
    (warning,) = caplog.records
    assert "transformer.also_gone" in warning.getMessage()
    assert "gone; left out" in warning.getMessage()
    assert runs.usable(config, stage_named("transformer"))
    with pytest.raises(UserError, match=r"unknown key 'transformer\.also_gone'"):
        load_pipeline(path, ["transformer.also_gone=1"])
    own = path.rename(runs.path.parent / "mine.yaml")
    with pytest.raises(UserError, match="unknown key"):
        load_pipeline(own)


def test_what_another_config_made_is_not_usable(runs: RunDirectory, tmp_path: Path) -> None:
    changed = _config(tmp_path, "transformer.layers=3")
    with pytest.raises(UserError, match=r"transformer is not finished for the run's config \(.*layers: 2 -> 3"):
        runs.usable(changed, stage_named("transformer"))
    _finish(runs, _config(tmp_path, "seed=1"), "prepare", "other data")
    with pytest.raises(UserError, match="input prepare changed"):
        runs.usable(_config(tmp_path), stage_named("image-tokenizer"))


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"name": "tiny"}', None])
def test_a_damaged_run_record_costs_one_line_and_the_advice_works(
    runs: RunDirectory, config: PipelineConfig, damage: str | None
) -> None:
    record = runs.path / "run.json"
    record.unlink() if damage is None else record.write_text(damage)
    with pytest.raises(UserError, match=r"whose run\.json is missing or damaged.*--take-over"):
        runs.check("tiny.yaml")
    runs.check(source_name(str(runs.path)))  # its own config means itself
    runs.check("tiny.yaml", take_over=True)
    runs.open(config, "tiny.yaml")
    runs.check("tiny.yaml")


def test_a_run_of_a_later_version_is_refused(runs: RunDirectory) -> None:
    (runs.path / "run.json").write_text('{"format": 99, "name": "tiny", "config_file": "tiny.yaml"}')
    with pytest.raises(UserError, match=r"expected format 1 or lower, found 99"):
        runs.check("tiny.yaml")


@pytest.mark.parametrize("place", ["/proc/here", "/dev/null/x", "/" + "x" * 300])
def test_a_place_that_cannot_be_written_is_told_in_one_line(place: str) -> None:
    config = load_pipeline(TINY, [f"runs={place}"])
    runs = RunDirectory(config.run_directory)
    with pytest.raises(UserError, match=r"expected a run directory that can be made and written"):  # noqa: PT012
        runs.check("tiny.yaml")
        with runs.lock_run():
            pass
