"""`init_from` in a stage's identity: the content of the weights counts, and not where they lie."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from pipeline.config.pipeline import load_pipeline
from pipeline.core.errors import UserError
from pipeline.orchestration.graph import stage_named
from pipeline.orchestration.local_runner import run_pipeline
from pipeline.orchestration.run_directory import RunDirectory
from pipeline.orchestration.start_model import find_start, made_from
from tests.conftest import NO_TRACKING, TINY
from tests.launch import launch

STAGE = stage_named("image-tokenizer")


def _model(folder: Path, content: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text(content)
    return folder


def _made_from(directory: Path, source: Path | None) -> dict[str, object]:
    overrides = [] if source is None else [f"image_tokenizer.init_from={source}"]
    return made_from(load_pipeline(TINY, overrides), STAGE, directory)


def test_the_content_of_the_weights_is_a_part_of_the_identity_and_their_path_is_not(tmp_path: Path) -> None:
    a, moved, b = (_model(tmp_path / name, name[0]) for name in ("a", "a-moved", "b"))
    stage = tmp_path / "stage"
    assert _made_from(stage, a) == _made_from(stage, moved)
    assert len({str(_made_from(stage, source)) for source in (a, b, None)}) == 3
    assert "init_from" not in str(_made_from(stage, None))


def test_of_another_librarys_tokenizer_the_content_counts_too(tmp_path: Path) -> None:
    values = yaml.safe_load(TINY.read_text())
    del values["image_tokenizer"]["model"]

    def of(source: Path) -> dict[str, object]:
        values["image_tokenizer"]["pretrained"] = {"library": "taming", "path": str(source)}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
        return made_from(load_pipeline(tmp_path / "config.yaml"), STAGE, tmp_path / "stage")

    a, moved, b = (_model(tmp_path / name, name[0]) for name in ("a", "a-moved", "b"))
    assert of(a) == of(moved) == of(a / "model.safetensors") != of(b)
    with pytest.raises(UserError, match=r"pretrained\.path: expected weights at .*/nowhere, found none"):
        of(tmp_path / "nowhere")


def test_a_stage_that_has_begun_does_not_ask_for_weights_that_are_gone(tmp_path: Path) -> None:
    source = _model(tmp_path / "a", "a")
    config = load_pipeline(TINY, [f"image_tokenizer.init_from={source}", f"runs={tmp_path / 'runs'}"])
    runs = RunDirectory(config.run_directory)
    runs.check("tiny.yaml")
    runs.open(config, "tiny.yaml")
    for name in ("prepare", "image-tokenizer"):
        runs.begin(config, stage_named(name))
        (runs.stage(name) / "output.txt").write_text(name)
        runs.finish(stage_named(name), {runs.stage(name) / "output.txt": None})
    shutil.rmtree(source)
    assert not runs.stale_reasons(config, STAGE)
    elsewhere = load_pipeline(TINY, [f"image_tokenizer.init_from={tmp_path / 'b'}", f"runs={tmp_path / 'runs'}"])
    with pytest.raises(UserError, match=r"found none of them at .*/b: give another path"):
        runs.stale_reasons(elsewhere, STAGE)
    with pytest.raises(UserError, match=r"image_tokenizer.init_from: expected a run, an export or a folder"):
        made_from(config, STAGE, tmp_path / "another")


def test_of_a_run_the_finished_stage_is_taken_and_its_text_tokenizer(tmp_path: Path) -> None:
    run = tmp_path / "run"
    model = _model(run / "transformer" / "model", "weights")
    (run / "config.yaml").write_text("")
    with pytest.raises(UserError, match=r"expected a run whose stage transformer is finished"):
        find_start(run, "transformer")
    (run / "transformer" / "_SUCCESS").write_text("")
    (run / "text-tokenizer").mkdir()
    (run / "text-tokenizer" / "tokenizer.json").write_text("{}")
    assert find_start(run, "transformer").folder == model
    exported = _model(run / "transformer" / "exported" / "step-00000010", "then")
    for source in (run, exported, model):
        assert find_start(source, "transformer").text_tokenizer == run / "text-tokenizer"
    with pytest.raises(UserError, match="found the run's own, .*: raise training.steps"):
        made_from(
            load_pipeline(TINY, [f"transformer.init_from={run}"]), stage_named("transformer"), run / "transformer"
        )


def test_a_place_without_a_model_is_told_before_the_first_stage_runs(tmp_path: Path) -> None:
    config = load_pipeline(TINY, ["transformer.init_from=nowhere", f"runs={tmp_path}"])
    with pytest.raises(UserError, match=r"transformer.init_from: .* found none of them at nowhere"):
        run_pipeline(config, "tiny.yaml")
    assert not list(tmp_path.iterdir())


def test_a_run_may_branch_off_the_run_whose_model_it_starts_from(tiny_run: Path, tmp_path: Path) -> None:
    training = "{steps: 2, batch_size: 16, warmup_steps: 0}"
    given = [f"transformer.init_from={tiny_run}", f"transformer.training={training}", NO_TRACKING]
    told = launch("pipeline", "run", str(tiny_run), f"runs={tmp_path}", "name=other", *given, "--only", "transformer")
    assert f"tokenize: taken over from {tiny_run}" in told
    assert f"start with the values of {tiny_run}/transformer/model, 0 fresh" in told
    assert (tmp_path / "other" / "transformer" / "_SUCCESS").is_file()
