"""A training on several sources draws the same samples, killed or not, on any number of processes."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from pipeline.config.pipeline import PipelineConfig, load_pipeline
from pipeline.core.atomic_io import read_json
from pipeline.core.errors import UserError
from pipeline.data.mixture import Mixture
from pipeline.data.stream import ImageStream
from pipeline.orchestration.going_on import amendments_of, shares_of_training
from pipeline.orchestration.graph import stage_named
from pipeline.orchestration.keep_finished import keep_finished
from tests.conftest import NO_TRACKING, TINY
from tests.launch import ROOT, command, environment, kill_all, launch
from tests.training.test_going_on import Begun
from tests.training.test_resume import _metrics

SOURCES = [
    "prepare.source=null",
    "prepare.sources=[{kind: openmoji, limit: 150, weight: 0.7},"
    " {kind: openmoji, without: [people], limit: 60, weight: 0.3}]",
]
OTHER = ["prepare.sources.0.weight=1", "prepare.sources.1.weight=4"]
BATCH = 16


class Mixed(Begun):
    """Of two sources."""

    def changed(self, *overrides: str) -> PipelineConfig:
        return super().changed(*SOURCES, *overrides)


def test_another_weight_in_the_middle_needs_amend_and_holds_from_the_checkpoint_on(tmp_path: Path) -> None:
    begun = Mixed(tmp_path, 20, finished=False)
    with pytest.raises(
        UserError, match=r"source_shares: \[700, 300\] -> \[200, 800\] after step 20 of 30: add --amend"
    ):
        begun.begin(*OTHER)
    assert begun.begin(*OTHER, amend=True)
    assert begun.begin(*OTHER)  # killed, and started again
    assert amendments_of(begun.directory) == [
        {"step": 20, "key": "source_shares", "old": [700, 300], "new": [200, 800]}
    ]
    found = shares_of_training(begun.changed(*OTHER), begun.stage, begun.directory)
    assert found == [(0, [700, 300]), (20 * BATCH, [200, 800])]


def test_other_numbers_of_the_same_shares_are_no_change(tmp_path: Path) -> None:
    begun = Mixed(tmp_path, 20, finished=True)
    same = begun.changed("prepare.sources.0.weight=7", "prepare.sources.1.weight=3")
    assert begun.runs.stale_reasons(same, begun.stage) == []


def test_finished_stages_stay_as_they_are_with_amend_and_another_training_is_made_without(tmp_path: Path) -> None:
    begun = Mixed(tmp_path, 20, finished=False)
    tokenizer, changed = stage_named("image-tokenizer"), begun.changed(*OTHER)
    assert begun.runs.stale_reasons(changed, stage_named("prepare")) == []
    assert begun.runs.stale_reasons(changed, tokenizer) == ["source_shares: [700, 300] -> [200, 800]"]
    before = begun.runs.manifest("image-tokenizer")
    keep_finished(begun.runs, changed)
    after = begun.runs.manifest("image-tokenizer")
    assert before is not None
    assert after is not None
    assert before["hash"] == after["hash"]
    assert [one["new"] for one in after["amendments"]] == [[200, 800]]
    for name in ("image-tokenizer", "tokenize"):
        assert begun.runs.stale_reasons(changed, stage_named(name)) == []
    # Without --amend it is another training, as after any other change of its config.
    back = begun.changed()
    assert begun.runs.begin(back, tokenizer)
    assert list((begun.runs.path / "superseded").iterdir())


def _start(log: Path, *arguments: str, processes: int) -> subprocess.Popen[bytes]:
    """The stage, which writes what it draws to a folder of this life's own."""
    log.mkdir(parents=True)
    process = command("tests.training.drawn_worker", arguments, processes)
    return subprocess.Popen(process, env=environment(DRAWN_LOG=str(log)), cwd=ROOT, stderr=subprocess.PIPE)


def _wait_for_step(run: Path, step: int, runner: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 600
    while not (run / f"image-tokenizer/checkpoints/step-{step:08d}").exists():
        assert runner.poll() is None, runner.communicate()[1].decode()
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.001)


def _drawn(lives: list[Path]) -> dict[int, int]:
    """Position -> sample, of the last life that drew one there; the processes of a life never disagree."""
    found: dict[int, int] = {}
    for life in lives:
        of_life: dict[int, int] = {}
        for path in life.glob("*.jsonl"):
            for line in path.read_text().splitlines():
                for position, sample in zip(*json.loads(line), strict=True):
                    assert of_life.setdefault(position, sample) == sample
        found |= of_life
    return found


@pytest.mark.slow
def test_killed_and_resumed_on_two_then_one_then_four_processes_draws_exactly_the_mixture(tmp_path: Path) -> None:
    overrides = [f"runs={tmp_path}", *SOURCES, NO_TRACKING]
    run = load_pipeline(TINY, overrides).run_directory
    launch("pipeline", "run", str(TINY), *overrides, "--only", "prepare")
    arguments, lives = ["--config", str(run / "config.yaml")], [tmp_path / name for name in ("two", "one", "four")]
    killed = _start(lives[0], *arguments, processes=2)
    _wait_for_step(run, 10, killed)
    kill_all([psutil.Process(killed.pid), *psutil.Process(killed.pid).children(recursive=True)])
    killed.communicate()
    again = _start(lives[1], *arguments, processes=1)
    _wait_for_step(run, 20, again)
    kill_all([psutil.Process(again.pid), *psutil.Process(again.pid).children(recursive=True)])
    again.communicate()
    last = _start(lives[2], *arguments, *OTHER, "--amend", processes=4)
    told = last.communicate()[1].decode()
    assert last.returncode == 0, told
    assert "openmoji-1: 800 of each 1,000 samples" in told
    (change,) = read_json(run / "image-tokenizer/manifest.json")["amendments"]
    assert (change["key"], change["step"]) in (("source_shares", 20), ("source_shares", 30))
    shares = [(0, (700, 300)), (change["step"] * BATCH, (200, 800))]
    order = ImageStream(run / "prepare", "train", 0, shares=shares).order
    drawn, positions = _drawn(lives), range(30 * BATCH)
    assert [drawn[position] for position in positions] == order.locate(np.array(positions))[0].tolist()
    assert isinstance(order, Mixture)
    names = [f"epochs/openmoji-{source}" for source in (0, 1)]
    logged = [[line[name] for name in names] for line in _metrics(run, "image-tokenizer") if names[0] in line]
    assert logged[-1] == order.epochs(30 * BATCH)
