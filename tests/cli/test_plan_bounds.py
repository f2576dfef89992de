"""`smalti plan` with numbers that nothing has: one line."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from pipeline.cli.plan import plan
from pipeline.core.errors import UserError
from tests.launch import ROOT

TINY = str(ROOT / "tests" / "configs" / "tiny.yaml")


@pytest.mark.parametrize(
    "options",
    [
        ["--utilisation", "1e-320"],
        ["--utilisation", "nan"],
        ["--peak-tflops", "nan"],
        ["--peak-tflops", "inf"],
        ["--memory-gb", "-1"],
        ["--gpus", "0"],
        ["--gpus", str(10**18)],
        ["--time-limit", "00:00:00"],
        ["transformer.width=9000000000000000000", "transformer.heads=1"],
        ["transformer.layers=9000000000000000000"],
        ["transformer.training.batch_size=9000000000000000000"],
    ],
)
def test_a_number_that_nothing_has_is_refused(options: list[str]) -> None:
    result = CliRunner().invoke(plan, [TINY, *options])
    assert result.exit_code
    assert isinstance(result.exception, (SystemExit, UserError)), result.exception


def test_groups_of_tune_that_gpus_would_share_are_refused() -> None:
    tuned = ["tune.enabled=true", "tune.reward=judge", "tune.training.batch_size=128", "tune.group_size=16"]
    result = CliRunner().invoke(plan, [str(ROOT / "configs" / "shapes.yaml"), *tuned, "--gpus", "16"])
    assert "expected a multiple of 16 processes × group_size 16" in str(result.exception)


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("generate.sampling.top_k=9999", "generate.sampling.top_k: expected at most the "),
        ("evaluate.sweep={top_k: [9999], samples: 4}", "evaluate.sweep.top_k: expected at most the "),
    ],
)
def test_sampling_that_the_model_cannot_follow_is_refused(override: str, complaint: str) -> None:
    result = CliRunner().invoke(plan, [TINY, override])
    assert isinstance(result.exception, UserError), result.output
    assert str(result.exception).startswith(complaint)


def test_milestones_take_disk_and_an_impossible_zero_stage_is_refused() -> None:
    milestones = ["transformer.training.steps=100", "transformer.training.keep_every=10"]
    bytes_of = [CliRunner().invoke(plan, [TINY, *overrides]).output for overrides in (milestones[:1], milestones)]
    line = [next(line for line in output.splitlines() if line.startswith("checkpoint ")) for output in bytes_of]
    assert "on disk with keep_checkpoints 2, one more" in line[0]
    assert "on disk with keep_checkpoints 2 and keep_every 10, one more" in line[1]
    each, two, twelve = (float(text.split()[index]) for text, index in ((line[0], 1), (line[0], 3), (line[1], 3)))
    assert (round(two / each), round(twelve / each)) == (2, 12)
    zero = CliRunner().invoke(plan, [TINY, "transformer.deepspeed.zero_stage=0", "transformer.training.precision=fp16"])
    assert "expected deepspeed.zero_stage 1, 2 or 3" in str(zero.exception)
