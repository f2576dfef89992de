"""The file system of the run directories: room, speed, and what locks, checkpoints and MLflow's database rely on."""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from pipeline.core.file_system import CLOCK_TOLERANCE_S, clock_skew_s
from pipeline.core.lock import Lock
from pipeline.doctor.finding import Finding, fail, ok, warn

_PROBE_BYTES = 64 << 20
_SMALL_FILES = 20
_LITTLE_ROOM_GB = 5.0
_SLOW_MB_PER_S = 50.0  # a checkpoint of a 100 M transformer, 1.2 GB, takes 24 s
_SLOW_FILE_S = 0.05
_LONG_NAME = 200


def storage(directory: Path) -> Iterator[Finding]:
    """All checks of the nearest folder that exists at or above `directory`."""
    folder = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not folder.is_dir():
        yield fail("disk", f"expected a folder, found a file: {folder}: choose another run directory (runs=…)")
        return
    free_gb = shutil.disk_usage(folder).free / 1e9
    try:
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=folder) as temporary:
            yield _speed(Path(temporary), folder, free_gb)
            yield _small_files(Path(temporary))
            yield _links(Path(temporary))
            yield _database(Path(temporary))
            yield _clock(Path(temporary))
    except OSError as error:
        yield fail("disk", f"expected to write in {folder}, found: {error.strerror} ({free_gb:.1f} GB free): free some"
                           " space, mend its rights, or choose another run directory (runs=…)")  # fmt: skip


def _speed(folder: Path, named: Path, free_gb: float) -> Finding:
    block, probe = os.urandom(1 << 20), folder / "speed"
    started = time.perf_counter()
    with open(probe, "wb") as file:
        for _ in range(_PROBE_BYTES // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    written = _PROBE_BYTES / 1e6 / (time.perf_counter() - started)
    probe.unlink()
    text = f"{named}: {free_gb:,.{0 if free_gb >= 10 else 1}f} GB free, writes {written:,.0f} MB/s"
    if free_gb < _LITTLE_ROOM_GB:
        return warn("disk", f"{text}: checkpoints need room, keep {_LITTLE_ROOM_GB:g} GB free or more")
    if written < _SLOW_MB_PER_S:
        return warn("disk", f"{text}: checkpoints will take long, set checkpoint_every accordingly")
    return ok("disk", text)


def _small_files(folder: Path) -> Finding:
    started = time.perf_counter()
    for number in range(_SMALL_FILES):
        with open(folder / f"{number:04d}".ljust(_LONG_NAME, "x"), "wb") as file:
            file.write(b"x")
            os.fsync(file.fileno())
    each = (time.perf_counter() - started) / _SMALL_FILES
    text = f"a file is made and synced in {1000 * each:.1f} ms"
    if each > _SLOW_FILE_S:
        return warn("small files", f"{text}: prefer few large shards (prepare.shard_size)")
    return ok("small files", text)


def _links(folder: Path) -> Finding:
    """What `core/lock.py` and `core/atomic_io.py` rely on: hard links that fail if the name is taken, and renames."""
    try:
        with Lock(folder / "lock", "the probe of the doctor"):
            pass
        (folder / "a").write_text("a")
        (folder / "b").write_text("b")
        (folder / "a").replace(folder / "b")
    except OSError as error:
        return fail(
            "locks", f"expected hard links and renames, found: {error.strerror}: use a file system that has them"
        )
    return ok("locks", "hard links and renames work")


def _database(folder: Path) -> Finding:
    try:
        with closing(sqlite3.connect(folder / "probe.db", timeout=5)) as connection, connection:
            connection.execute("CREATE TABLE probe (x)")
    except sqlite3.Error as error:
        return warn(
            "sqlite", f"MLflow's database cannot lie here ({error}): set tracking.uri to a server, or a local database"
        )
    return ok("sqlite", "MLflow's database can lie here")


def _clock(folder: Path) -> Finding:
    skew_s = clock_skew_s(folder)
    if abs(skew_s) > CLOCK_TOLERANCE_S:
        return fail(
            "clock", f"expected the file system's time, found this machine {skew_s:+.0f} s off: start chrony or ntpd"
        )
    return ok("clock", "as the file system's")
