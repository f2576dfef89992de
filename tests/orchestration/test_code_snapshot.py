"""What a run records of its code: our own commit and changes, and never those of somebody else's repository."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from pipeline.core.version import VERSION
from pipeline.orchestration.code_snapshot import copy_packages, record_version


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A git repository with one commit, of a source tree, and one change that is not committed."""
    for package in ("pipeline", "stages"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("")
    _git(tmp_path, "init", "--quiet")
    _git(tmp_path, "add", ".")
    _git(tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "-m", "one")
    (tmp_path / "stages" / "__init__.py").write_text("changed = True\n")
    return tmp_path


def _git(directory: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", directory, *arguments], check=True, capture_output=True, text=True).stdout


def _recorded(code: Path, to: Path) -> tuple[dict[str, object], str]:
    record_version(to, code)
    return json.loads((to / "version.json").read_text()), (to / "uncommitted.patch").read_text()


def test_a_source_tree_records_its_commit_and_what_is_not_committed(repository: Path, tmp_path: Path) -> None:
    version, patch = _recorded(repository, tmp_path / "code")
    assert version == {"version": VERSION, "commit": _git(repository, "rev-parse", "HEAD").strip(), "changed": True}
    assert "+changed = True" in patch


@pytest.mark.parametrize("folder", ["site-packages", "."])
def test_code_that_lies_in_somebody_elses_repository_records_nothing_of_it(
    folder: str, repository: Path, tmp_path: Path
) -> None:
    installed = repository / folder
    if folder == ".":  # as with `pip install --target .`
        _git(repository, "rm", "--cached", "--quiet", "-r", "pipeline", "stages")
    else:
        copy_packages(installed, repository)
    assert _recorded(installed, tmp_path / "code") == ({"version": VERSION, "commit": None, "changed": False}, "")


def test_the_copy_has_the_packages_and_replaces_an_older_copy(repository: Path, tmp_path: Path) -> None:
    target = tmp_path / "code" / "src"
    target.mkdir(parents=True)
    (target / "stale.py").touch()
    copy_packages(target, repository)
    found = sorted(str(path.relative_to(target)) for path in target.rglob("*.py"))
    assert found == ["pipeline/__init__.py", "stages/__init__.py"]
