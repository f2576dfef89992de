"""The manifests of a run's finished stages. Each is read and hashed once, for as long as it is the same file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NotRequired, TypedDict

from pipeline.core.atomic_io import read_json, sha256_file, write_atomic, write_json
from pipeline.core.manifest import FileRecord
from pipeline.orchestration.going_on import Amendment, stays_finished
from pipeline.orchestration.graph import as_of_today

_Version = tuple[int, int, int]  # inode, time and size: files are replaced whole, never changed


class Manifest(TypedDict):
    """manifest.json of a finished stage."""

    stage: str
    config: dict[str, object]  # `graph.stage_identity`
    inputs: dict[str, str]  # the hash of each input's manifest
    outputs: dict[str, FileRecord]
    amendments: NotRequired[list[Amendment]]  # what changed in the middle of a training
    hash: str  # of all above: what was made from what, and no times, paths or versions
    code: NotRequired[dict[str, object] | None]  # version.json of the run's code
    outside: NotRequired[str]  # the stamp of what it read from outside of the run


class Manifests:
    """Of the stages of the run directory `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read: dict[str, tuple[tuple[_Version, _Version], Manifest]] = {}

    def of(self, name: str) -> Manifest | None:
        """The manifest of a finished stage; None if it is not finished, or the manifest was changed."""
        success, path = self.path / name / "_SUCCESS", self.path / name / "manifest.json"
        try:
            versions = _version(success), _version(path)
        except FileNotFoundError:
            return None
        if name in self._read and self._read[name][0] == versions:
            return self._read[name][1]
        if success.read_text(errors="replace").strip() != sha256_file(path):
            return None
        manifest: Manifest = read_json(path)
        self._read[name] = versions, {**manifest, "config": as_of_today(manifest["config"])}
        return self._read[name][1]

    def amend(self, name: str) -> None:
        """Give a training that is finished, and stays so, what its identity.json says now; its hash is what it was.

        Nothing where it is not finished, or has steps to do: then its identity has other steps than its manifest.
        """
        manifest, directory = self.of(name), self.path / name
        identity = read_json(directory / "identity.json")
        if manifest is None or not stays_finished(manifest["config"], identity["config"]):
            return
        write_json(directory / "manifest.json", {**manifest, **identity})
        write_atomic(directory / "_SUCCESS", sha256_file(directory / "manifest.json") + "\n")


def _version(path: Path) -> _Version:
    about = os.stat(path)
    return about.st_ino, about.st_mtime_ns, about.st_size
