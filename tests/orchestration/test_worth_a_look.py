"""A run that finished says what is worth a look: cut captions, unused codes, a validation that rises."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.config.pipeline import load_pipeline
from pipeline.orchestration.tracking import read_history
from pipeline.orchestration.worth_a_look import worth_a_look
from tests.conftest import TINY
from tests.launch import launch


def _stage(folder: Path, *lines: dict[str, float]) -> Path:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"time": 1.0} | line) + "\n" for line in lines))
    return folder


def test_captions_that_were_cut_are_told_with_the_length_that_keeps_nearly_all(tmp_path: Path) -> None:
    folder = _stage(tmp_path / "text-tokenizer")
    config = load_pipeline(str(TINY))
    for share, found in ((0.25, 1), (0.01, 0)):
        (folder / "stats.json").write_text(json.dumps({"captions_cut_share": share, "tokens_per_caption/p99": 14.0}))
        lines = worth_a_look(config, {"text-tokenizer": folder})
        assert len(lines) == found
    (folder / "stats.json").write_text(json.dumps({"captions_cut_share": 0.25, "tokens_per_caption/p99": 14.0}))
    line = worth_a_look(config, {"text-tokenizer": folder})[0]
    assert "25% of the captions are longer than text_length 8" in line
    assert "text_tokenizer.text_length=14" in line


def test_codes_that_lie_unused_at_the_end_are_told_by_level(tmp_path: Path) -> None:
    folder = _stage(
        tmp_path / "image-tokenizer",
        {"step": 10, "val/codebook_usage_0": 0.05, "val/codebook_usage_1": 0.05},
        {"step": 20, "val/codebook_usage_0": 0.9, "val/codebook_usage_1": 0.06},
    )
    assert "6% on level 1 of the codes are in use" in worth_a_look(load_pipeline(str(TINY)), {folder.name: folder})[0]


@pytest.mark.parametrize(
    ("validated", "trained", "found"), [(1.3, 0.5, 1), (1.04, 0.5, 0), (1.3, 2.0, 0), (0.9, 0.5, 0)]
)
def test_a_validation_that_rises_while_training_falls_is_told_with_its_best_step(
    tmp_path: Path, validated: float, trained: float, found: int
) -> None:
    folder = _stage(
        tmp_path / "transformer",
        {"step": 10, "loss/image": 1.5, "val/loss/image": 1.8},
        {"step": 20, "loss/image": 1.0, "val/loss/image": 1.0},
        {"step": 30, "loss/image": trained, "val/loss/image": validated},
    )
    lines = worth_a_look(load_pipeline(str(TINY)), {"transformer": folder})
    assert len(lines) == found
    assert not found or "val/loss/image rose from 1 at step 20 to 1.3 at step 30" in lines[0]


def test_of_steps_that_were_repeated_the_later_values_hold_and_half_a_line_is_none(tmp_path: Path) -> None:
    folder = _stage(
        tmp_path / "transformer", {"step": 2, "loss": 3.0}, {"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}
    )
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "loss"')
    assert read_history(folder) == [{"step": 1, "time": 1, "loss": 2}, {"step": 2, "time": 1, "loss": 1}]


def test_run_ends_with_the_list_and_the_report_begins_with_it(tiny_run: Path) -> None:
    said = launch("pipeline", "run", str(tiny_run / "config.yaml"))
    begin = said.index("worth a look:\n  text-tokenizer: ")
    assert begin < said.index("done: open ")
    page = (tiny_run / "report" / "index.html").read_text()
    assert page.index("of the captions are longer than text_length 8") < page.index("Generated images")
