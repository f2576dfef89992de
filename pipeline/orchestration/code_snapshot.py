"""The code of a run: its version, and a copy of it for queued jobs.

    runs/<name>/code/version.json        package version, git commit, whether anything was uncommitted
    runs/<name>/code/uncommitted.patch   the uncommitted changes
    runs/<name>/code/src/                the packages themselves (`smalti submit`)

The code may be a source tree or an installed wheel; both have the packages side by side in one folder.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from pipeline.core.atomic_io import write_atomic, write_json
from pipeline.core.version import VERSION

CODE = Path(__file__).resolve().parents[2]  # the root of the source tree, or site-packages
PACKAGES = ("pipeline", "stages")


def record_version(directory: Path, code: Path = CODE) -> None:
    """Write version.json and uncommitted.patch. An installed wheel has a version, and neither commit nor changes."""
    commit = _git(code, "rev-parse", "HEAD") if _is_source_tree(code) else None
    changes = _git(code, "diff", "HEAD") if commit else None
    directory.mkdir(parents=True, exist_ok=True)
    version = {"version": VERSION, "commit": commit.strip() if commit else None, "changed": bool(changes)}
    write_json(directory / "version.json", version)
    write_atomic(directory / "uncommitted.patch", changes or "")


def copy_packages(target: Path, code: Path = CODE) -> None:
    """Copy the packages into the folder `target`: what is queued does not change when the installed code does."""
    draft = target.with_name(target.name + ".new")
    for leftover in (draft, target):
        shutil.rmtree(leftover, ignore_errors=True)
    for package in PACKAGES:
        shutil.copytree(code / package, draft / package, ignore=shutil.ignore_patterns("__pycache__"))
    draft.rename(target)


def _is_source_tree(code: Path) -> bool:
    """Whether `code` is the root of a git repository that tracks this package.

    A wheel that is installed somewhere inside a repository of somebody else has nothing to do with its commits.
    """
    top = _git(code, "rev-parse", "--show-toplevel")
    tracked = _git(code, "ls-files", "pipeline/__init__.py")
    return bool(top and tracked) and Path(str(top).strip()).resolve() == code


def _git(directory: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(directory), *arguments], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
