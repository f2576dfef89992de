"""Class-conditional models: `transformer.condition=class`, folders as classes, guidance by the null class."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.config.base import parse_config
from pipeline.config.generate import SamplingConfig
from pipeline.config.pipeline import PipelineConfig, load_pipeline
from pipeline.config.text_tokenizer import TextTokenizerConfig
from pipeline.config.transformer import TransformerConfig
from pipeline.core.errors import UserError
from pipeline.core.image_io import to_pil
from pipeline.evaluation.image_sets import images_at
from pipeline.image_tokenizer.base import build
from pipeline.orchestration.graph import stage_identity
from pipeline.sampling.pipeline import Pipeline
from pipeline.text_tokenizer import TextTokenizer
from pipeline.transformer.layout import Layout
from pipeline.transformer.model import Transformer
from pipeline.transformer.objective import JointObjective
from tests.conftest import NO_TRACKING, TINY
from tests.data.sample_images import write_folder
from tests.data.small_run import MODEL
from tests.launch import launch

_TRAINED = ("image_tokenizer", "transformer")
OF_CLASSES = ("transformer.condition=class", "generate.training_prompts=[dark, light]", "generate.new_prompts=[]")


def test_a_model_of_classes_generates_the_class_that_is_named_and_no_other() -> None:
    text = TextTokenizer.of_classes(["dark", "light"], TextTokenizerConfig())
    torch.manual_seed(0)
    images = build(MODEL, 16)
    classes = [torch.randint(0, 32, (1, 64)) for _ in range(2)]  # an image each
    batch = {"text": text.encode(["dark", "light"] * 8), "codes": torch.cat(classes * 8)}
    values = {"layers": 1, "width": 32, "heads": 2, "condition": "class", "caption_dropout": 0.2}
    config = TransformerConfig.model_validate(values)
    objective = JointObjective(Transformer(Layout.of(1, text.vocab_size, images.levels), config), config)
    optimizer = torch.optim.Adam(objective.parameters(), 0.02)
    for step in range(40):
        optimizer.zero_grad()
        objective(batch, step)[0].backward()
        optimizer.step()
    pipeline = Pipeline(text, objective.eval().transformer, images)
    drawn = list(pipeline.generate(["light", "dark"], 1, 0, SamplingConfig(temperature=0, guidance=2)))
    expected = [to_pil(images.decode([codes]))[0] for codes in classes[::-1]]
    assert [one.image.tobytes() for one in drawn] == [image.tobytes() for image in expected]
    with pytest.raises(UserError, match="expected the name of one of the 2 classes"):
        list(pipeline.generate(["dusk"], 1, 0, SamplingConfig()))


@pytest.mark.slow
def test_the_stages_of_a_run_of_folders_know_its_classes(tmp_path: Path) -> None:
    for name in ("dark", "light"):
        write_folder(tmp_path / "images" / name, 8, start=8 * (name == "light"))
    source = f"prepare.source={{kind: folder, path: {tmp_path / 'images'}, captions: folders}}"
    for stage in ("prepare", "text-tokenizer"):
        launch("pipeline", stage, "--config", str(TINY), source, *OF_CLASSES, "generate.samples=0",
               "prepare.validation_fraction=0.4", "tracking.enabled=false", cwd=tmp_path)  # fmt: skip
    found = TextTokenizer.from_pretrained(tmp_path / "runs" / "tiny" / "text-tokenizer")
    assert (found.classes, found.text_length) == (["dark", "light"], 1)


@pytest.mark.slow
def test_a_whole_run_of_classes_ends_with_samples_that_the_evaluators_protocol_measures(tmp_path: Path) -> None:
    for number, name in enumerate(("dark", "light")):
        write_folder(tmp_path / "images" / name, 16, start=16 * number)
    source = f"prepare.source={{kind: folder, path: {tmp_path / 'images'}, captions: folders}}"
    short = [f"{stage}.training={{steps: 4, batch_size: 8, warmup_steps: 0}}" for stage in _TRAINED]
    small = ["prepare.validation_fraction=0.3", "generate.samples=6", "evaluate.reconstructions=4", NO_TRACKING]
    guided = "generate.sampling={guidance: 2}"
    launch("pipeline", "run", str(TINY), source, *OF_CLASSES, *short, *small, guided, cwd=tmp_path)
    run, samples = tmp_path / "runs" / "tiny", tmp_path / "samples.npz"
    assert "dark" in (run / "report" / "index.html").read_text()
    launch("pipeline", "generate", str(run), "--npz", str(samples))
    with np.load(samples, allow_pickle=False) as content:
        assert (content["arr_0"].dtype, content["arr_0"].shape) == (np.uint8, (6, 16, 16, 3))
        keys = [image.caption for image in images_at(run / "generate" / "samples")]
        assert content["arr_1"].tolist() == [["dark", "light"].index(caption or "") for caption in keys]
    both = ("--real", str(tmp_path / "images"), "--fake", str(samples), "--cache", str(tmp_path / "cache"))
    launch("pipeline", "evaluate", *both, "-o", str(tmp_path / "metrics.json"), cwd=tmp_path)
    rows = json.loads((tmp_path / "metrics.json").read_text())["rows"]
    assert {row["n_generated"] for row in rows} == {6}
    assert {"FD (Lite0)", "KID (Lite0)", "precision k=5 (Lite0)"} <= {row["metric"] for row in rows}
    assert all(row["protocol"] and row["extractor"] and row["resize"] for row in rows)


def test_a_run_of_text_keeps_its_identity_and_one_of_classes_has_another() -> None:
    text, classes = load_pipeline(TINY), load_pipeline(TINY, OF_CLASSES)
    assert "condition" not in stage_identity(text, "text-tokenizer")
    assert "condition" not in str(stage_identity(text, "transformer"))
    assert stage_identity(classes, "text-tokenizer")["condition"] == "class"
    assert (text.transformer.text_loss_weight, classes.transformer.text_loss_weight) == (0.125, 0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("generate.new_prompts=[a new one]", "has no prompts but its classes"),
        ("transformer.bpe_dropout=0.1", "a class is one token"),
    ],
)
def test_what_classes_do_not_have_is_refused(given: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_pipeline(TINY, (*OF_CLASSES, given))


def test_a_given_weight_of_the_text_loss_counts() -> None:
    values = load_pipeline(TINY, OF_CLASSES).model_dump()
    values["transformer"]["text_loss_weight"] = 0.5
    assert parse_config(PipelineConfig, values, where="test").transformer.text_loss_weight == 0.5
