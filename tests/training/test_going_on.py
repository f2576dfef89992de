"""A training goes on with more steps, or another learning rate with --amend: from its checkpoint, and on record."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.config.pipeline import PipelineConfig, load_pipeline
from pipeline.config.training import TrainingConfig
from pipeline.core.atomic_io import read_json
from pipeline.core.errors import UserError
from pipeline.orchestration.going_on import amendments_of
from pipeline.orchestration.graph import stage_named
from pipeline.orchestration.mlflow_sender import _parameters
from pipeline.orchestration.run_directory import RunDirectory
from pipeline.report.run_facts import read_facts
from pipeline.slurm.cluster import load_cluster
from pipeline.slurm.submit import submit_pipeline
from pipeline.training.schedule import learning_rate_factor
from tests.conftest import NO_TRACKING, TINY
from tests.launch import ROOT, launch
from tests.training.test_resume import BEFORE_THE_TRANSFORMER, _killed, _metrics, _outputs, _prepared
from tests.training.test_trainer import SmallWorkload, _repeatable, _train

RATE = "transformer.training.learning_rate=0.001"


class Begun:
    """A run whose transformer has checkpoints up to a step, finished or not; its inputs are finished."""

    stage = stage_named("transformer")

    def __init__(self, folder: Path, step: int, finished: bool) -> None:
        self.folder = folder
        self.config = self.changed()
        self.runs = RunDirectory(self.config.run_directory)
        self.runs.check("tiny.yaml")
        self.runs.open(self.config, "tiny.yaml")
        self.directory = self.runs.stage("transformer")
        for name in ("prepare", "text-tokenizer", "image-tokenizer", "tokenize"):
            self._finish(name)
        self.runs.begin(self.config, self.stage)
        if step:
            (self.directory / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
        if finished:
            self._finish("transformer")

    def _finish(self, name: str) -> None:
        if self.runs.begin(self.config, stage_named(name)):
            output = self.runs.stage(name) / "output.txt"
            output.write_text(name)
            self.runs.finish(stage_named(name), {output: None})

    def changed(self, *overrides: str) -> PipelineConfig:
        return load_pipeline(TINY, [f"runs={self.folder}", *overrides])

    def begin(self, *overrides: str, amend: bool = False) -> bool:
        """Begin the stage with another config; whether it goes on from its checkpoints."""
        config = self.changed(*overrides)
        self.runs.go_on(config, self.stage, amend, check_only=True)
        assert self.runs.begin(config, self.stage, amend=amend)
        return (self.directory / "checkpoints").exists()


def test_a_finished_training_goes_on_when_steps_are_raised_and_that_is_on_record(tmp_path: Path) -> None:
    begun = Begun(tmp_path, 30, finished=True)
    more = begun.changed("transformer.training.steps=60")
    assert begun.runs.stale_reasons(more, begun.stage) == ["transformer.training.steps: 30 -> 60"]
    assert begun.begin("transformer.training.steps=60")
    change = {"step": 30, "key": "transformer.training.steps", "old": 30, "new": 60}
    assert amendments_of(begun.directory) == [change]
    assert begun.begin("transformer.training.steps=60")  # killed, and started again
    output = begun.directory / "output.txt"
    output.write_text("more")
    begun.runs.finish(begun.stage, {output: None})
    assert not begun.runs.stale_reasons(more, begun.stage)
    manifest = begun.runs.manifest("transformer")
    assert manifest
    assert manifest["amendments"] == [change]
    with pytest.raises(UserError, match=r"expected training.steps above 30, which are done, found .*steps: 60 -> 30"):
        begun.begin()


def test_without_a_checkpoint_more_steps_start_over_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    begun = Begun(tmp_path, 0, finished=True)
    assert not begun.begin("transformer.training.steps=60")
    assert "no checkpoint is left to go on from: it starts over" in caplog.text
    assert list((begun.runs.path / "superseded").iterdir())


def test_another_rate_in_the_middle_is_refused_by_key_old_and_new_unless_it_is_amended(tmp_path: Path) -> None:
    begun = Begun(tmp_path, 20, finished=False)
    with pytest.raises(UserError, match=r"learning_rate: 0\.002 -> 0\.001 after step 20 of 30: add --amend"):
        begun.begin(RATE)
    with pytest.raises(UserError, match=r"steps: 30 -> 25 after step 20 of 30: add --amend"):
        begun.begin("transformer.training.steps=25")
    with pytest.raises(UserError, match="expected training.steps above 20"):
        begun.begin("transformer.training.steps=15", amend=True)
    assert begun.begin(RATE, "transformer.training.steps=40", amend=True)
    assert begun.begin(RATE, "transformer.training.steps=40")  # killed, and started again
    assert [(one["step"], one["key"].rpartition(".")[2], one["new"]) for one in amendments_of(begun.directory)] == [
        (20, "learning_rate", 0.001),
        (20, "steps", 40),
    ]
    parameters = _parameters(begun.directory)
    assert isinstance(parameters, dict)
    assert parameters["amended.20.transformer.training.steps"] == "30 -> 40"


def test_submit_refuses_as_run_does_and_what_it_records_with_amend_counts_for_the_jobs(tmp_path: Path) -> None:
    begun = Begun(tmp_path, 20, finished=False)
    cluster = load_cluster(ROOT / "configs" / "cluster" / "example.yaml")
    changed = begun.changed(RATE)
    with pytest.raises(UserError, match=r"learning_rate: 0\.002 -> 0\.001 after step 20 of 30: add --amend"):
        submit_pipeline(changed, "tiny.yaml", cluster, dry_run=True)
    begun.runs.go_on(changed, begun.stage, amend=True)
    assert begun.begin(RATE)


def test_what_may_not_change_in_the_middle_starts_over_whether_amended_or_not(tmp_path: Path) -> None:
    begun = Begun(tmp_path, 20, finished=False)
    assert not begun.begin(RATE, "transformer.layers=3", amend=True)
    assert begun.begin()  # its config comes back, with its checkpoint
    finished = Begun(tmp_path / "finished", 30, finished=True)
    with pytest.raises(UserError, match="expected training.steps above 30, which are done"):
        finished.begin(RATE, amend=True)
    assert not finished.begin(RATE)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_more_steps_continue_as_if_there_had_been_so_many_with_the_new_schedule(schedule: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"schedule": schedule, "learning_rate": 0.1}
    _train(tmp_path / "more", more := SmallWorkload(), steps=6, **settings)
    lines = _repeatable(_train(tmp_path / "more", more := SmallWorkload(), steps=10, **settings))
    config = TrainingConfig(steps=10, batch_size=4, warmup_steps=0, **settings)
    rates = {line["step"]: line["learning_rate"] for line in lines if "learning_rate" in line}
    assert rates[8] == pytest.approx(0.1 * learning_rate_factor(config, 7))
    whole = _repeatable(_train(tmp_path / "whole", of_whole := SmallWorkload(), steps=10, **settings))
    if schedule == "constant":
        assert lines == whole
        ends = more.objective.state_dict(), of_whole.objective.state_dict()
        assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_more_steps_after_optimizer_states_were_dropped_say_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _train(tmp_path, SmallWorkload(), steps=6, keep_optimizer=False)
    _train(tmp_path, SmallWorkload(), steps=6, keep_optimizer=False)
    assert "optimizer" not in caplog.text
    with caplog.at_level(logging.WARNING):
        _train(tmp_path, SmallWorkload(), steps=8, keep_optimizer=False)
    assert "the checkpoint of step 6 has no optimizer states" in caplog.text


@pytest.mark.slow
def test_a_training_amended_in_its_middle_and_killed_ends_with_the_bits_of_an_amended_one(
    tiny_run: Path, tmp_path: Path
) -> None:
    _prepared(tiny_run, tmp_path / "killed", "prepare", "text-tokenizer")
    run = _killed(tmp_path / "killed", "image-tokenizer", lambda stage: (stage / "checkpoints/step-00000010").exists())
    undisturbed = tmp_path / "undisturbed" / "tiny"
    shutil.copytree(run, undisturbed)
    rate = "image_tokenizer.training.learning_rate=0.001"
    command = ["run", "--only", "image-tokenizer", str(TINY), rate, NO_TRACKING]
    before = (run / "config.yaml").read_text()
    refused = launch("pipeline", *command, f"runs={run.parent}", check=False)
    assert "learning_rate: 0.002 -> 0.001 after step" in refused
    assert (run / "config.yaml").read_text() == before
    launch("pipeline", *command, "--amend", f"runs={undisturbed.parent}")
    _killed(
        run.parent, "image-tokenizer", lambda stage: (stage / "checkpoints/step-00000020").exists(), rate, "--amend"
    )
    launch("pipeline", *command, f"runs={run.parent}")
    assert _outputs(run, "image-tokenizer") == _outputs(undisturbed, "image-tokenizer")
    assert _metrics(run, "image-tokenizer") == _metrics(undisturbed, "image-tokenizer")
    model = "model/model.safetensors"  # the optimizer's rate, too, is the new one
    assert _outputs(run, "image-tokenizer")[model] != _outputs(tiny_run, "image-tokenizer")[model]
    rates = {
        line["step"]: line["learning_rate"] for line in _metrics(run, "image-tokenizer") if "learning_rate" in line
    }
    config = load_pipeline(TINY, [rate]).image_tokenizer.training
    assert rates[25] == pytest.approx(0.001 * learning_rate_factor(config, 24))
    facts = read_facts({name: undisturbed / name for name in ("prepare", "image-tokenizer")})
    assert [change["new"] for change in facts.stages["image-tokenizer"].amendments] == [0.001]


@pytest.mark.slow
def test_a_finished_transformer_goes_on_with_more_steps_and_what_reads_it_is_out_of_date(
    tiny_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "tiny"
    shutil.copytree(tiny_run, run)
    told = launch("pipeline", "run", str(run), "transformer.training.steps=40", "--only", "transformer", NO_TRACKING)
    assert "transformer: resumes after step 30 with transformer.training.steps: 30 -> 40" in told
    assert "resuming from step 30" in told
    assert read_json(run / "transformer/checkpoints/step-00000040/trainer.json")["step"] == 40
    assert "generate        would run: input transformer changed" in launch("pipeline", "run", str(run), "--dry-run")
    assert json.loads((run / "transformer/manifest.json").read_text())["amendments"][0]["step"] == 30


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "metric", "more"),
    [
        ("transformer", "val/loss/image", ["transformer.deepspeed.zero_stage=0"]),
        ("transformer", "val/loss/image", ["transformer.deepspeed.zero_stage=3"]),
        ("image-tokenizer", "val/psnr", []),
    ],
)
def test_a_fine_tuning_starts_where_the_model_that_it_starts_from_was(
    stage: str, metric: str, more: list[str], tiny_run: Path, tmp_path: Path
) -> None:
    run = _prepared(tiny_run, tmp_path, *BEFORE_THE_TRANSFORMER)
    shutil.rmtree(run / stage, ignore_errors=True)
    section = stage.replace("-", "_")
    training = "{steps: 1, batch_size: 16, warmup_steps: 0, learning_rate: 1.0e-9}"
    overrides = [f"{section}.init_from={tiny_run}", f"{section}.training={training}", NO_TRACKING, *more]
    told = launch(f"stages.{section}", "--config", str(run / "config.yaml"), *overrides)
    tensors = len(load_file(tiny_run / stage / "model/model.safetensors"))
    assert f"init_from: {tensors} tensors start with the values of {tiny_run}/{stage}/model, 0 fresh" in told
    found, theirs = (_metrics(of, stage)[-1][metric] for of in (run, tiny_run))
    assert found == pytest.approx(theirs, rel=1e-4)
    assert "init_from" in (run / stage / "identity.json").read_text()
