"""A model's folder from a checkpoint of the finished tiny run. (Bit for bit at each ZeRO stage: test_engines.py.)"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import AutoModel

import pipeline.transformer.hf  # noqa: F401 (registers the type)
from pipeline import Pipeline
from pipeline.cli.main import cli
from pipeline.core.errors import UserError
from pipeline.core.weights import count_parameters, weight_files
from pipeline.sampling.model_source import find_models
from pipeline.training import consolidate
from pipeline.training.consolidate import export_step
from pipeline.transformer.model import Transformer


@pytest.mark.parametrize("stage", ["image-tokenizer", "transformer"])
def test_the_last_checkpoint_exports_to_what_the_stage_wrote(stage: str, tiny_run: Path, tmp_path: Path) -> None:
    arguments = [str(tiny_run), str(tmp_path / "out"), "--step", "30", "--stage", stage]
    result = CliRunner().invoke(cli, ["export", *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tiny_run / stage / "model" / name).read_bytes(), name
    assert f"{'averaged' if stage == 'image-tokenizer' else 'not averaged'} weights" in result.output


def test_without_the_average_an_export_has_the_weights_that_were_trained(tiny_run: Path, tmp_path: Path) -> None:
    _, averaged = export_step(tiny_run, "image-tokenizer", 30, tmp_path / "out", averaged=False)
    assert not averaged
    trained = torch.load(tiny_run / "image-tokenizer/checkpoints/step-00000030/training.pt")["model"]
    found = load_file(tmp_path / "out/model.safetensors")
    assert found
    assert all(torch.equal(value, trained[f"tokenizer.{name}"]) for name, value in found.items())


def test_weights_in_several_files_load_like_one(tiny_run: Path, tmp_path: Path) -> None:
    arguments = [str(tiny_run), str(tmp_path / "out"), "--step", "30", "--shard-gb", "0.0001"]
    assert CliRunner().invoke(cli, ["export", *arguments], catch_exceptions=False).exit_code == 0
    files = weight_files(tmp_path / "out")
    assert len(files) > 2
    whole = Transformer.from_pretrained(tiny_run / "transformer/model").state_dict()
    for loaded in (
        Transformer.from_pretrained(tmp_path / "out").state_dict(),
        AutoModel.from_pretrained(tmp_path / "out").transformer.state_dict(),
    ):
        assert all(torch.equal(whole[name], loaded[name]) for name in whole)
    assert count_parameters(tmp_path / "out") == count_parameters(tiny_run / "transformer/model")
    (tmp_path / "out" / files[1]).unlink()
    with pytest.raises(UserError, match=f"expected {files[1]}, found none"):
        Transformer.from_pretrained(tmp_path / "out")


def test_a_run_generates_with_the_transformer_of_a_checkpoint_while_it_is_in_training(
    tiny_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "tiny"
    shutil.copytree(tiny_run, run)
    finished = Pipeline.from_pretrained(run)
    (run / "transformer" / "_SUCCESS").unlink()
    with pytest.raises(UserError):
        Pipeline.from_pretrained(run)
    images = {}
    for step in (20, 30, 30):
        at_step = Pipeline.from_pretrained(run, step=step)
        images[step] = at_step.generate(["joker"], seed=5)[0].image.tobytes()
        assert at_step.source.model_hash != finished.source.model_hash
    assert images[30] == finished.generate(["joker"], seed=5)[0].image.tobytes()
    assert images[20] != images[30]


def test_a_step_that_another_process_exports_meanwhile_is_taken_from_there(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "tiny"
    shutil.copytree(tiny_run, run)
    written: list[str] = []

    def slower(checkpoint: Path, directory: Path, *rest: Any) -> bool:
        monkeypatch.undo()
        written.append(find_models(run, step=20).model_hash)  # the other one begins and ends in the middle of this one
        return consolidate.consolidate(checkpoint, directory, *rest)

    monkeypatch.setattr(consolidate, "consolidate", slower)
    assert [find_models(run, step=20).model_hash] == written
    assert [path.name for path in (run / "transformer/exported").iterdir()] == ["step-00000020"]


@pytest.mark.parametrize("option", [["--no-averaged"], ["--shard-gb", "1"]], ids=" ".join)
def test_an_option_of_checkpoints_is_refused_where_none_is_named(option: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="need a checkpoint: add --step N"):
        CliRunner().invoke(cli, ["export", "run", str(tmp_path / "out"), *option], catch_exceptions=False)


def test_what_cannot_be_exported_is_one_line(tiny_run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the steps that have one are 20, 30"):
        export_step(tiny_run, "transformer", 7, tmp_path / "out")
    with pytest.raises(UserError, match="expected averaged weights in .*, found none: .*; add --no-averaged"):
        export_step(tiny_run, "transformer", 30, tmp_path / "out", averaged=True)
    checkpoint = tmp_path / "run/transformer/checkpoints/step-00000030"
    shutil.copytree(tiny_run / "transformer/checkpoints/step-00000030", checkpoint)
    (checkpoint / "model.json").unlink()
    with pytest.raises(UserError, match=r"model\.json: expected .*, found no file: the checkpoint is damaged"):
        export_step(tmp_path / "run", "transformer", 30, tmp_path / "out")
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    del manifest["files"]["model.json"]
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="an older version wrote it"):
        export_step(tmp_path / "run", "transformer", 30, tmp_path / "out")
    assert not (tmp_path / "out").exists()
