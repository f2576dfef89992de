"""A training on two processes of which one fails: who says so, where, and what both have done until then."""

from __future__ import annotations

import gzip
import json
import re
import shutil
from pathlib import Path

import pytest

from tests.launch import launch
from tests.training.test_resume import BEFORE_THE_TRANSFORMER, SHARDED

MESSAGE = "error (rank 1): train/000007.codes.0.npy is damaged"


@pytest.fixture(scope="module")
def failed(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The run, and what its processes have said."""
    run = tmp_path_factory.mktemp("failed") / "tiny"
    run.mkdir()
    for name in ("run.json", "config.yaml"):
        shutil.copy(tiny_run / name, run)
    for stage in BEFORE_THE_TRANSFORMER:
        shutil.copytree(tiny_run / stage, run / stage)
    settings = ["profile={start: 2, steps: 1}", "collective_timeout_s=77", "stop_check_every=1"]
    arguments = ["--config", str(run / "config.yaml"), *SHARDED, *(f"transformer.training.{key}" for key in settings)]
    return run, launch("tests.training.failing_rank_worker", *arguments, processes=2, check=False)


def test_what_a_rank_finds_is_told_once_with_its_rank_and_stands_in_its_own_log(failed: tuple[Path, str]) -> None:
    run, told = failed
    assert told.count("is damaged") == told.count(MESSAGE) == 1, told
    assert (run / "logs" / "transformer.log").read_text().count(MESSAGE) == 1
    assert (run / "logs" / "transformer" / "rank-00001.log").read_text().count(MESSAGE) == 1


def test_the_others_say_in_a_line_that_they_have_lost_it(failed: tuple[Path, str]) -> None:
    assert "transformer crashed" not in failed[1], failed[1]
    assert len(re.findall(r"^transformer ends on rank 0, which has lost another: .*peer", failed[1], re.M)) == 1


def test_every_group_of_processes_waits_as_long_as_we_say(failed: tuple[Path, str]) -> None:
    for rank in range(2):
        found = re.search(rf"rank {rank} waits at most \[([^]]*)\] s", failed[1])
        assert found, failed[1]
        limits = [float(limit) for limit in found[1].split(",")]
        assert limits.count(12 * 3600) == 1  # that of control
        assert set(limits) == {77, 12 * 3600}
        assert len(limits) > 2  # DeepSpeed has made some


def test_each_rank_leaves_a_trace_of_the_steps_to_profile(failed: tuple[Path, str]) -> None:
    traces = sorted((failed[0] / "transformer" / "profile").iterdir())
    assert [path.name for path in traces] == ["rank-00000.json.gz", "rank-00001.json.gz"]
    for path in traces:
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        assert any("gloo:" in event["name"] for event in events)
