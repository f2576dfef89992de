"""A source that changed is read again; one that did not, is frozen, or is gone counts as it was."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pipeline.cli  # registers what prepare reads from outside  # noqa: F401
from pipeline.config.pipeline import PipelineConfig, load_pipeline
from pipeline.data.prepare import prepare
from pipeline.data.shards import read_index
from pipeline.data.source_stamp import source_stamp
from pipeline.orchestration.graph import stage_named
from pipeline.orchestration.run_directory import RunDirectory
from tests.conftest import NO_TRACKING, TINY
from tests.data.sample_images import encoded, image, tree_bytes, write_folder, write_tar
from tests.launch import ROOT, launch

PREPARE = stage_named("prepare")


def _config(tmp_path: Path, source: dict[str, Any]) -> PipelineConfig:
    return load_pipeline(TINY, [f"runs={tmp_path}", f"prepare.source={json.dumps(source)}"])


def _made(config: PipelineConfig) -> bool:
    """What the stage does; False if it was up to date."""
    runs = RunDirectory(config.run_directory)
    if not runs.begin(config, PREPARE):
        return False
    prepare(runs.stage("prepare"), config.prepare, config.seed)
    runs.finish(PREPARE, {runs.stage("prepare") / name: None for name in ("index.json", "catalog")})
    return True


def _samples(config: PipelineConfig) -> int:
    return sum(split["samples"] for split in read_index(config.run_directory / "prepare")["splits"].values())


def _folder(path: Path, more: int) -> dict[str, Any]:
    write_folder(path / "in", 20 + more)
    return {"kind": "folder", "path": str(path / "in")}


def _table(path: Path, more: int) -> dict[str, Any]:
    write_folder(path / "in", 40)
    lines = [f"in/{n:05d}.png,number {n}" for n in range(20 + more)]
    (path / "t.csv").write_text("\n".join(["file,caption", *lines]))
    return {"kind": "table", "path": str(path / "t.csv"), "path_column": "file"}


def _tars(path: Path, more: int) -> dict[str, Any]:
    for number in range(2 + (more > 0)):
        members = [
            (f"{number}-{n}.{e}", encoded(image(10 * number + n)) if e == "png" else b"a cat")
            for n in range(10)
            for e in ("png", "txt")
        ]
        if not (path / f"in/{number}.tar").exists():
            write_tar(path / f"in/{number}.tar", members)
    return {"kind": "webdataset", "urls": str(path / "in/*.tar")}


@pytest.mark.parametrize("source", [_folder, _table, _tars])
def test_what_was_added_to_a_source_is_prepared_and_what_was_not_touched_is_up_to_date(
    tmp_path: Path, source: Callable[[Path, int], dict[str, Any]]
) -> None:
    config = _config(tmp_path, source(tmp_path, 0))
    assert _made(config)
    assert not _made(config)
    assert _samples(config) == 20
    source(tmp_path, 10)
    runs = RunDirectory(config.run_directory)
    assert runs.outside_changes(config, PREPARE) == ["what it reads from outside has changed"]
    assert _made(config)
    assert _samples(config) == 30
    assert not _made(config)


def test_a_branch_that_prepares_what_was_added_leaves_the_run_that_it_came_from_as_it_was(tmp_path: Path) -> None:
    config = _config(tmp_path, _folder(tmp_path, 0))
    RunDirectory(config.run_directory).open(config, "tiny.yaml")
    assert _made(config)
    before = tree_bytes(config.run_directory / "prepare")
    _folder(tmp_path, 3)
    branch = load_pipeline(config.run_directory, ["name=branch"])
    RunDirectory(branch.run_directory).open(branch, "tiny.yaml")
    taken = branch.run_directory / "prepare/catalog/train.keys"
    assert taken.samefile(config.run_directory / "prepare/catalog/train.keys")
    assert _made(branch)
    assert _samples(branch) == 23
    assert tree_bytes(config.run_directory / "prepare") == before


def test_a_source_that_is_frozen_or_gone_or_was_prepared_before_there_were_stamps_is_up_to_date(tmp_path: Path) -> None:
    config = _config(tmp_path, _folder(tmp_path, 0))
    assert _made(config)
    frozen = _config(tmp_path, {"kind": "folder", "path": str(tmp_path / "in"), "frozen": True})
    _folder(tmp_path, 5)
    assert not _made(frozen)
    (tmp_path / "in").rename(tmp_path / "away")
    assert not _made(config)
    (tmp_path / "away").rename(tmp_path / "in")
    manifest = config.run_directory / "prepare/manifest.json"
    values = json.loads(manifest.read_text())
    del values["outside"]
    manifest.write_text(json.dumps(values))
    (config.run_directory / "prepare/_SUCCESS").write_text(hashlib.sha256(manifest.read_bytes()).hexdigest() + "\n")
    assert not _made(config)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_an_image_that_a_table_names_is_prepared_again_when_it_is_replaced(tmp_path: Path, kind: str) -> None:
    source = _table(tmp_path, 0)
    if kind == "jsonl":
        rows = [{"file": f"in/{n:05d}.png", "caption": f"number {n}"} for n in range(20)]
        (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
        source["path"] = str(tmp_path / "t.jsonl")
    config = _config(tmp_path, source)
    assert _made(config)
    before = {path.parent.name: path.read_bytes() for path in (config.run_directory / "prepare").rglob("*.tar")}
    (tmp_path / "in/00003.png").write_bytes(encoded(image(777)))
    assert _made(config)
    after = {path.parent.name: path.read_bytes() for path in (config.run_directory / "prepare").rglob("*.tar")}
    assert before != after
    assert not _made(config)
    (tmp_path / "in/00030.png").write_bytes(b"the table does not name it")
    (tmp_path / "in/00004.png").unlink()
    assert _made(config)
    assert _samples(config) == 19


def test_a_table_that_was_prepared_when_its_images_were_not_looked_at_is_up_to_date(tmp_path: Path) -> None:
    config = _config(tmp_path, _table(tmp_path, 0))
    assert _made(config)
    path = config.run_directory / "prepare/manifest.json"
    manifest = json.loads(path.read_text())
    assert len(manifest["outside"].split()) == 2
    manifest["outside"] = manifest["outside"].split()[0]
    path.write_text(json.dumps(manifest))
    (config.run_directory / "prepare/_SUCCESS").write_text(hashlib.sha256(path.read_bytes()).hexdigest() + "\n")
    assert not _made(config)


def test_the_hash_of_a_result_does_not_depend_on_the_times_of_its_source(tmp_path: Path) -> None:
    config = _config(tmp_path, _folder(tmp_path, 0))
    _made(config)
    runs = RunDirectory(config.run_directory)
    first = runs.manifest("prepare")
    os.utime(tmp_path / "in/00003.png", (1, 1))
    assert _made(config)
    second = runs.manifest("prepare")
    assert first is not None
    assert second is not None
    assert first["hash"] == second["hash"], "what reads these shards would run again"


@pytest.mark.parametrize("name", ["notes.md", ".hidden.png", "__MACOSX/x.png"])
def test_files_that_are_no_samples_do_not_outdate_a_source(tmp_path: Path, name: str) -> None:
    source = _config(tmp_path, _folder(tmp_path, 0)).prepare.source
    before = source_stamp(source)
    (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "in" / name).write_text("something")
    assert before is not None
    assert source_stamp(source) == before


def test_the_stamp_of_a_source_needs_no_torch_and_no_packages_of_sources(tmp_path: Path) -> None:
    code = (
        "import sys, pipeline.cli.main, pipeline.data.source_stamp as s; from pipeline.config.prepare import *;"
        f"s.source_stamp(FolderSource(kind='folder', path={str(tmp_path)!r}));"
        "s.source_stamp(OpenMojiSource(kind='openmoji'));"
        "sys.exit(bool({'torch', 'datasets', 'emoji'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.slow
def test_run_prepares_what_was_added_to_the_source(tmp_path: Path) -> None:
    source = json.dumps(_folder(tmp_path, 0))
    arguments = ["run", str(TINY), "--only", "prepare", f"runs={tmp_path}", f"prepare.source={source}", NO_TRACKING]
    launch("pipeline", *arguments)
    assert "up to date" in launch("pipeline", *arguments)
    _folder(tmp_path, 3)
    assert "what it reads from outside has changed" in launch("pipeline", *arguments)
    assert _samples(load_pipeline(TINY, [f"runs={tmp_path}"])) == 23
