"""Data that an earlier version prepared still loads, or is prepared again; what was made today's way stays as it is."""

from __future__ import annotations

import json
import os
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.config.base import digest, identity
from pipeline.config.pipeline import load_pipeline
from pipeline.config.prepare import PrepareConfig
from pipeline.core.atomic_io import sha256_file
from pipeline.core.errors import UserError
from pipeline.data.catalog import Catalog
from pipeline.data.inspect import inspect_directory
from pipeline.data.prepare import _tasks, prepare
from pipeline.data.prepare_part import _FORMAT
from pipeline.data.shards import read_samples
from pipeline.data.stream import ImageStream
from pipeline.orchestration.graph import stage_named
from pipeline.orchestration.run_directory import RunDirectory
from tests.conftest import TINY
from tests.data.sample_images import folder_config, tree_bytes

# What commit d1b9d5e, before there were several sources and sizes, made of `_photos`.
FINGERPRINTS = ["ec81d1d76c123f8d", "8b92291a386cb6b6", "e25032b07cf3fe53"]
ORDER = [16, 18, 13, 9, 8, 15, 10, 12, 1, 4, 3, 7, 6, 2, 0, 5, 0, 1, 4, 3, 6, 5, 2, 7, 18, 16, 12, 8, 13, 9, 15, 10]
# Of index.json and of a part's record in commit 858fdb5, which knew no catalog and counted no sources.
OLD_INDEX = ("image_size", "splits", "rejected", "conversions", "credit")
OLD_RECORD = ("fingerprint", "without", "hashes", "conversions", "rejected", "shards", "indexes", "left_out")


def _write_json(path: Path, values: dict[str, object]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PrepareConfig:
    """Of 20 images in files whose bytes, times and relative path are the same everywhere."""
    monkeypatch.chdir(tmp_path)
    folder = Path("photos")
    folder.mkdir()
    for number in range(20):
        image = folder / f"{number:05d}.bmp"
        Image.fromarray(np.full((16, 16, 3), number, np.uint8)).save(image)
        image.with_suffix(".txt").write_text(f"image number {number}")
        for path in (image, image.with_suffix(".txt")):
            os.utime(path, (1_700_000_000, 1_700_000_000))
    return folder_config(folder, image_size=16, shard_size=8, validation_fraction=0.2)


def _order(directory: Path) -> list[int]:
    stream = ImageStream(directory, "train", seed=0)
    return [int(image[0, 0, 0]) for batch in islice(stream.batches(0, 8), 4) for image in batch["images"]]


def _made_long_ago(directory: Path, config: PrepareConfig, other_format: bool) -> dict[Path, int]:
    """The layout of commit 858fdb5 in `directory`; the tars and their times."""
    prepare(directory, config, seed=0)
    for path in [*(directory / "catalog").iterdir(), *(directory / "parts").glob("*.columns.npz")]:
        path.unlink()
    (directory / "catalog").rmdir()
    for path in [directory / "index.json", *(directory / "parts").glob("*.json")]:
        kept = (
            OLD_INDEX
            if path.name == "index.json"
            else (*OLD_RECORD, *(() if other_format else ("found", "passed_over")))
        )
        values = {name: value for name, value in json.loads(path.read_text()).items() if name in kept}
        if other_format and "fingerprint" in values:
            values["fingerprint"] = "of format 2"
        path.write_text(json.dumps(values))
    return {tar: tar.stat().st_mtime_ns for tar in directory.rglob("*.tar")}


def test_one_source_has_the_fingerprints_and_the_order_that_it_had(config: PrepareConfig) -> None:
    prepare(Path("out"), config, seed=0)
    records = [json.loads(path.read_text()) for path in sorted(Path("out/parts").glob("*.json"))]
    assert [record["fingerprint"][:16] for record in records] == FINGERPRINTS
    assert _order(Path("out")) == ORDER


@pytest.mark.parametrize("other_format", [False, True])
def test_an_old_folder_loads_in_the_same_order_and_prepare_brings_it_up_to_date(
    config: PrepareConfig, other_format: bool
) -> None:
    times = _made_long_ago(Path("old"), config, other_format)
    assert _order(Path("old")) == ORDER
    catalog = Catalog(Path("old"), "train")
    assert catalog.keys([0]) == ["00000"]
    assert catalog.captions([0]) == ["image number 0"]
    assert len(list(read_samples(Path("old"), "train"))) == len(catalog)
    assert "images of 16×16" in next(iter(inspect_directory(Path("old"), None, verify=True)))
    prepare(Path("old"), config, seed=0)
    stayed = [tar.stat().st_mtime_ns == time for tar, time in times.items()]
    assert stayed == [not other_format] * len(times)
    prepare(Path("new"), config, seed=0)
    assert tree_bytes(Path("old")) == tree_bytes(Path("new"))


def test_an_old_folder_of_which_less_is_left_says_to_run_prepare_again(config: PrepareConfig) -> None:
    times = _made_long_ago(Path("old"), config, other_format=False)
    for tar in times:
        tar.with_suffix(".index.npy").unlink()  # versions before that wrote none
    with pytest.raises(UserError, match=r"is missing or damaged: .*: run the stage prepare again"):
        _order(Path("old"))
    (Path("old") / "index.json").unlink()
    with pytest.raises(UserError, match="found none: run the stage prepare first"):
        _order(Path("old"))
    prepare(Path("old"), config, seed=0)
    assert _order(Path("old")) == ORDER


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_of_when_the_bound_of_rejected_samples_decided_stays_and_takes_another(
    config: PrepareConfig, tmp_path: Path, finished: bool
) -> None:
    of_run = load_pipeline(TINY, [f"runs={tmp_path}", "seed=0", "prepare.max_rejected_fraction=0.5"])
    of_run = of_run.model_copy(update={"prepare": config.model_copy(update={"max_rejected_fraction": 0.5})})
    runs, stage = RunDirectory(of_run.run_directory), stage_named("prepare")
    assert runs.begin(of_run, stage)
    directory = runs.stage("prepare")
    prepare(directory, of_run.prepare, seed=0)
    runs.finish(stage, {directory / "index.json": None})
    # As it was recorded then: the bound as it was set, in the identity, the manifest and the parts.
    for path in (directory / "identity.json", directory / "manifest.json"):
        values = json.loads(path.read_text())
        values["config"]["prepare"]["max_rejected_fraction"] = 0.5
        _write_json(path, values)
    for path in (directory / "parts").glob("*.json"):
        task = next(t for t in _tasks(directory, of_run.prepare, 0) if t.record_path == path)
        as_set = identity(task.config) | {"max_rejected_fraction": 0.5}
        _write_json(path, {**task.record(), "fingerprint": digest([_FORMAT, task.part.fingerprint, as_set, 0])})
    if finished:
        (directory / "_SUCCESS").write_text(sha256_file(directory / "manifest.json") + "\n")
    else:
        (directory / "_SUCCESS").unlink()
    before = {path: path.stat().st_mtime_ns for path in (directory / "train").iterdir()}
    again = RunDirectory(of_run.run_directory)
    if finished:
        higher = of_run.prepare.model_copy(update={"max_rejected_fraction": 0.7})
        assert not again.begin(of_run.model_copy(update={"prepare": higher}), stage)
    assert again.begin(of_run, stage) == (not finished)
    prepare(directory, of_run.prepare, seed=0)
    assert {path: path.stat().st_mtime_ns for path in (directory / "train").iterdir()} == before
    assert not (runs.path / "superseded").exists()
