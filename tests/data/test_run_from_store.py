"""A run whose data lies in an object store, by the commands that users type: it comes out as the one on the disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.metric_names import CLOCK_METRICS
from pipeline.orchestration.run_directory import RunDirectory
from tests.conftest import NO_TRACKING
from tests.data.s3 import s3_server
from tests.launch import launch


@pytest.fixture(scope="module")
def bucket() -> Iterator[Any]:
    with s3_server("runs") as files:
        yield files


def _losses(run: Path, stage: str) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / stage / "metrics.jsonl").read_text().splitlines()]
    of_machine = (*CLOCK_METRICS, "time", "system/")
    return [{name: value for name, value in line.items() if not name.startswith(of_machine)} for line in lines]


def _hash(run: Path, stage: str) -> str:
    manifest = RunDirectory(run).manifest(stage)
    assert manifest is not None
    return manifest["hash"]


def test_tokenizer_tokens_and_transformer_from_the_store_are_those_from_the_disk(
    tiny_run: Path, bucket: Any, tmp_path: Path
) -> None:
    run = tmp_path / "tiny"
    shutil.copytree(tiny_run, run)
    for stage in ("image-tokenizer", "tokenize", "transformer", "generate", "evaluate", "report"):
        shutil.rmtree(run / stage)
    settings = [NO_TRACKING, f"store.cache={tmp_path / 'cache'}"]

    def stage(name: str) -> None:
        launch(f"stages.{name}", "--config", str(run / "config.yaml"), *settings)

    told = launch("pipeline", "data", "push", str(run), "s3://runs/tiny", "--remove")
    assert "prepare: " in told
    assert not list(run.rglob("prepare/*/*.tar"))
    stage("image_tokenizer")
    stage("tokenize")
    launch("pipeline", "data", "push", str(run), "s3://runs/tiny", "--remove")
    assert not list(run.rglob("*.tokens"))
    stage("transformer")
    for name in ("image-tokenizer", "tokenize", "transformer"):
        assert _hash(run, name) == _hash(tiny_run, name)
    for name in ("image-tokenizer", "transformer"):
        assert _losses(run, name) == _losses(tiny_run, name)
    assert "every shard is, byte for byte" in launch("pipeline", "data", "inspect", str(run))
    launch("pipeline", "run", str(run), *settings)  # evaluate reads images from the store
    for name in ("prepare", "transformer"):
        assert _hash(run, name) == _hash(tiny_run, name)
    assert (run / "report/_SUCCESS").exists()
    assert not list(run.rglob("prepare/*/*.tar"))
