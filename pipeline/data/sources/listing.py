"""All files below a folder with their stamps, local or by fsspec. Links to folders are followed, each folder once."""

from __future__ import annotations

import logging
import os
import posixpath

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from pipeline.core.text import visible
from pipeline.data.sources.base import Stamp, interrupted, is_leftover, stamp

log = logging.getLogger(__name__)


def list_files(files: AbstractFileSystem, root: str, told: bool = True) -> dict[str, Stamp]:
    """The stamp of every file below `root`, by its path below it. `told`: say which links are not followed.

    Raises:
        UserError: a folder cannot be listed.
    """
    if isinstance(files, LocalFileSystem):
        return _local(root, logging.WARNING if told else logging.DEBUG)
    found: dict[str, Stamp] = {}
    for folder, _, entries in files.walk(root, detail=True, on_error="raise"):
        below = folder[len(root) + 1 :]
        for name, info in entries.items():
            if name:
                found[posixpath.join(below, name)] = stamp(info)
    return found


def _local(root: str, level: int) -> dict[str, Stamp]:
    """Real folders first, so that a folder has its own name and not that of a link to it."""
    found: dict[str, Stamp] = {}
    seen: set[tuple[int, int]] = set()
    links = _walk(root, "", found, seen, level)
    while links:
        path = links.pop(0)
        full = os.path.join(root, path)
        target, place = os.path.realpath(full), os.path.realpath(os.path.dirname(full))
        if os.path.join(place, "").startswith(os.path.join(target, "")):
            _tell(level, full, "leads to a folder that it lies in")
        else:
            links = sorted(links + _walk(root, path, found, seen, level))
    return found


def _walk(root: str, below: str, found: dict[str, Stamp], seen: set[tuple[int, int]], level: int) -> list[str]:
    """Add the files of a folder and of the real folders in it; returns the links to folders, sorted."""
    links: list[str] = []
    folders = [below]
    while folders:
        folder = folders.pop()
        full = os.path.join(root, folder)
        try:
            about = os.stat(full)
            if (about.st_dev, about.st_ino) in seen:
                _tell(level, full, "is a folder that was read under another name")
                continue
            seen.add((about.st_dev, about.st_ino))
            with os.scandir(full) as entries:
                for entry in entries:
                    path = posixpath.join(folder, entry.name)
                    if _leads_to_folder(entry):
                        (links if entry.is_symlink() else folders).append(path)
                    else:
                        found[path] = _stamp(entry)
        except OSError as error:
            if not is_leftover(folder):
                raise interrupted(full, error) from error
    return sorted(links)


def _tell(level: int, full: str, what: str) -> None:
    log.log(level, "prepare: %s %s: not read again", visible(full), what)


def _leads_to_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _stamp(entry: os.DirEntry[str]) -> Stamp:
    try:
        about = entry.stat()
    except OSError:  # a link to nowhere: reading it says so
        about = entry.stat(follow_symlinks=False)
    return [about.st_size, str(about.st_mtime)]
