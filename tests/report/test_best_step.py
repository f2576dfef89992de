"""With `training.keep_best` the report says of which step the model is, and shows where that lies."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from pipeline.config.pipeline import load_pipeline
from pipeline.orchestration.graph import stages_of
from pipeline.report.build import build_report
from pipeline.report.plots import panels

HISTORY = [
    {"step": float(step), "time": 0.0, "val/loss/image": value, "best/val/loss/image": 2.5, "best/step": 4.0}
    for step, value in ((4, 2.5), (8, 3.5))
]


def test_the_best_step_has_a_ring_in_the_curve_of_its_metric_and_no_curve_of_its_own() -> None:
    ringed, plain = (panels(HISTORY, "transformer", best)[0].svg for best in (("val/loss/image", 2.5, 4), None))
    assert ringed.count("<use ") == plain.count("<use ") + 1
    assert "best/" not in ringed
    assert panels(HISTORY, "transformer", ("val/psnr", 2.5, 4))[0].svg == plain


def test_the_page_says_which_step_is_the_model(tiny_run: Path, tmp_path: Path) -> None:
    config = load_pipeline(tiny_run / "config.yaml")
    stages = {stage.name: tiny_run / stage.name for stage in stages_of(config)[:-1]}
    stages["transformer"] = Path(shutil.copytree(tiny_run / "transformer", tmp_path / "transformer"))
    with open(stages["transformer"] / "metrics.jsonl", "a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in HISTORY))
    report = build_report(stages, config)
    assert "best val/loss/image 2.50 at step 4, which is the model" in report.page
    assert report.page != build_report(stages | {"transformer": tiny_run / "transformer"}, config).page
