"""A run on the source shapes is told, task by task, how many images show what their prompts say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.evaluation.image_sets import images_at
from pipeline.evaluation.judged import COMBINATIONS, RECONSTRUCTED, judged_prompts
from pipeline.shapes.judge import judge
from pipeline.shapes.prompts import TASKS, read
from tests.conftest import NO_TRACKING, TINY
from tests.launch import launch


def test_prompts_are_of_every_task_and_of_the_combinations_that_they_are_called_after() -> None:
    seen, held_out = ([read(text) for text in judged_prompts(12, which, seed=0)] for which in (False, True))
    assert [prompt.task for prompt in seen] == [task for task in TASKS for _ in range(12)]
    assert {prompt.task for prompt in held_out} == {*TASKS} - {"one object"}
    assert not any(prompt.held_out for prompt in seen)
    assert all(prompt.held_out for prompt in held_out)
    assert judged_prompts(12, False, seed=0) == judged_prompts(12, False, seed=0) != judged_prompts(12, False, seed=1)


@pytest.mark.slow
def test_a_run_on_shapes_reports_the_share_of_right_images(tmp_path: Path) -> None:
    changes = [
        "prepare.source={kind: shapes, samples: 120}", "prepare.image_size=48", "image_tokenizer.training.steps=6",
        "transformer.training.steps=6", "transformer.layers=1", "image_tokenizer.model.widths=[8, 8]",
        "image_tokenizer.model.patch_size=4", "evaluate.judged_prompts=2", "generate.samples=8",
        "generate.training_prompts=[]", "generate.new_prompts=[a red circle]", "text_tokenizer.text_length=16",
    ]  # fmt: skip
    launch("pipeline", "run", str(TINY), NO_TRACKING, *changes, cwd=tmp_path)
    run = tmp_path / "runs" / "tiny"
    rows = json.loads((run / "evaluate" / "metrics.json").read_text())["rows"]
    shares = {(row["metric"], row["compares"]): row for row in rows if row["metric"].startswith("right, ")}
    assert len(shares) == len(TASKS) + 1 + len(TASKS) + 1  # held out of all tasks but one; reconstructions
    for name, compares in COMBINATIONS.items():
        images = images_at(run / "evaluate" / "judged" / f"{name}.tar")
        right = [judge(one.image, one.caption or "").right for one in images]
        assert shares["right, all tasks", compares]["value"] == sum(right) / len(right)
        assert shares["right, all tasks", compares]["n_generated"] == len(right)
    assert ("right, all tasks", RECONSTRUCTED) in shares
    page = (run / "report" / "index.html").read_text()
    assert "Prompts, judged by pixels" in page
    assert "right, attribute binding" in page
