"""A run's image shards and token arrays into an object store, from where trainings read them (`remote_file.py`).

    for line in push(run_directory, "s3://bucket/my-run", remove=True): print(line)

Each file is compared with its checksum before it is sent, and has that in its name there, so that an interrupted
push resumes where it was, and none takes the place of another. What lies there is recorded last, in store.json
of the stage (`core/elsewhere.py`); with `remove` the local files go after that.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fsspec import AbstractFileSystem

from pipeline.core import elsewhere
from pipeline.core.atomic_io import sha256_file
from pipeline.core.credentials import without_password
from pipeline.core.elsewhere import Elsewhere, FilesElsewhere
from pipeline.core.errors import UserError
from pipeline.core.lock import Lock
from pipeline.core.progress import progress
from pipeline.core.urls import mask
from pipeline.data.remote_file import is_remote, patiently
from pipeline.data.shards import read_index, read_shards
from pipeline.data.token_parts import damage, part_file
from pipeline.data.tokens import read_token_index, split_parts
from pipeline.orchestration.run_directory import RunDirectory

_AT_A_TIME = 8  # files: each is sent by several connections where it is large
_SUFFIXES = {"prepare": ".tar", "tokenize": ".tokens"}


@dataclass(frozen=True)
class _File:
    """A file of a stage, and how its content is compared: what is wrong with it, or None."""

    name: str
    bytes: int
    content: str
    damage: Callable[[Path], str | None]


def push(run: Path, url: str, remove: bool) -> Iterator[str]:
    """Send the large files of the run's finished stages `prepare` and `tokenize` to `url`; a line for each stage.

    Raises:
        UserError: neither is finished, a file is damaged or lies nowhere, or the store stays away.
    """
    if not is_remote(url):
        raise UserError(f"expected the URL of an object store, as s3://bucket/folder, found {url}")
    runs, done = RunDirectory(run), 0
    for stage, suffix in _SUFFIXES.items():
        if runs.manifest(stage) is None:
            continue
        done += 1
        with Lock(runs.lock(stage), f"stage {stage}"):
            files = {split: list(found) for split, found in _FILES_OF[stage](runs.stage(stage)).items()}
            if not any(files.values()):
                yield f"{stage}: its images stay in the tars of the source, nothing to send"
                continue
            yield _push_stage(runs.stage(stage), Elsewhere(f"{url.rstrip('/')}/{stage}", suffix, {}), files, remove)
    if not done:
        raise UserError(
            f"expected a run whose stage prepare or tokenize is finished at {run}, found none: run it first"
        )


def _push_stage(directory: Path, there: Elsewhere, files: dict[str, list[_File]], remove: bool) -> str:
    known = patiently(there.url, _sizes)
    every = [file for found in files.values() for file in found]
    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        sent = pool.map(lambda file: _send(directory, there, file, known), every)
        count = sum(progress(sent, total=len(every), description=f"push {directory.name}", unit="file"))
    folders: dict[str, FilesElsewhere] = {
        split: {"files": len(found), "bytes": sum(file.bytes for file in found)} for split, found in files.items()
    }
    elsewhere.write(directory, Elsewhere(without_password(there.url), there.suffix, folders))
    gone = _remove(directory, every) if remove else 0
    removed = f", {gone} local ones removed" if remove else ""
    total = sum(file.bytes for file in every)
    return (
        f"{directory.name}: {len(every)} files, {total / 1e6:,.1f} MB, at {mask(there.url)}; {count} sent now{removed}"
    )


def _send(directory: Path, there: Elsewhere, file: _File, known: dict[str, int]) -> bool:
    """Whether a file had to be sent."""
    path, name = directory / file.name, elsewhere.object_name(file.name, file.content)
    if known.get(name) == file.bytes:
        return False
    if not path.is_file():
        raise UserError(
            f"expected {file.name} at {path} or {mask(there.url)}/{name}, found neither: run {directory.name} again"
        )
    if fault := file.damage(path):
        raise UserError(f"{fault}: remove it and run the stage {directory.name} again")

    def send(files: AbstractFileSystem, to: str) -> None:
        files.makedirs(posixpath.dirname(to), exist_ok=True)
        files.put_file(str(path), to)
        if (found := files.size(to)) != file.bytes:
            raise OSError(f"expected {file.bytes} bytes behind the upload, found {found}")

    patiently(there.url_of(file.name, file.content), send)
    return True


def _sizes(files: AbstractFileSystem, path: str) -> dict[str, int]:
    """Bytes of every object below a folder, by its name there."""
    files.invalidate_cache()
    try:
        found = files.find(path, detail=True)
    except FileNotFoundError:
        return {}
    return {name.removeprefix(path).lstrip("/"): about["size"] for name, about in found.items()}


def _remove(directory: Path, files: Sequence[_File]) -> int:
    here = [path for file in files if (path := directory / file.name).is_file()]
    for path in here:
        path.unlink()
    return len(here)


def _shards(directory: Path) -> dict[str, Iterator[_File]]:
    def of(split: str) -> Iterator[_File]:
        for shard in read_shards(directory, split, index):
            if shard.tar is None:
                yield _File(shard.name, shard.bytes, shard.sha256, partial(_other, shard.sha256))

    index = read_index(directory)
    return {split: of(split) for split, entry in index["splits"].items() if entry["samples"]}


def _other(sha256: str, path: Path) -> str | None:
    found = sha256_file(path)
    return None if found == sha256 else f"{path} is damaged: expected sha256 {sha256[:12]}, found {found[:12]}"


def _tokens(directory: Path) -> dict[str, Iterator[_File]]:
    def of(split: str) -> Iterator[_File]:
        for records in split_parts(directory, split, index):
            name, size, content = part_file(split, records)
            yield _File(name, size, content, partial(damage, records=records))

    index = read_token_index(directory)
    return {split: of(split) for split, entry in index["splits"].items() if entry["samples"]}


_FILES_OF: dict[str, Callable[[Path], dict[str, Iterator[_File]]]] = {"prepare": _shards, "tokenize": _tokens}
