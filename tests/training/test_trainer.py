"""The loop reports a training that diverges, and how fast it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from pipeline.core.metric_names import CLOCK_METRICS
from tests.launch import launch


def test_a_training_that_diverges_stops_and_says_what_to_try(tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "tiny"
    shutil.copytree(tiny_run, run, ignore=shutil.ignore_patterns("transformer", "generate", "evaluate", "report"))
    overrides = [
        "transformer.training.learning_rate=1e30",
        "transformer.training.max_nonfinite_steps=3",
        "transformer.training.precision=fp32",
        "transformer.deepspeed.zero_stage=0",
    ]
    output = launch("stages.transformer", "--config", str(run / "config.yaml"), *overrides, check=False)
    assert "expected finite gradients, found 3 non-finite steps in a row at step" in output
    assert "lower training.learning_rate" in output
    assert "Traceback" not in output


def test_speed_memory_and_gradient_norm_are_among_the_metrics(tiny_run: Path) -> None:
    for stage, names in (("image-tokenizer", set(CLOCK_METRICS) - {"tokens_per_s"}), ("transformer", CLOCK_METRICS)):
        lines = [json.loads(line) for line in (tiny_run / stage / "metrics.jsonl").read_text().splitlines()]
        logged = [line for line in lines if "samples_per_s" in line]
        assert logged
        for line in logged:
            assert all(line[name] > 0 for name in [*names, "gradient_norm", "learning_rate"])
            assert line["mfu"] < 2  # of matrix products measured on a busy machine
