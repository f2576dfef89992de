"""The doctor names what is wrong with a disk, with locks and with a database: real ones, with planted faults."""

from __future__ import annotations

import shutil
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from pipeline.config.pipeline import load_pipeline
from pipeline.doctor import run as runs
from tests.conftest import TINY
from tests.core.test_lock import HOLDER
from tests.doctor.test_doctor import Lines, consult
from tests.launch import environment
from tests.namespaces import namespaces

# A file system as FAT or some FUSE ones: no hard links, no file locks, 60 ms a sync and 30 ms for each megabyte.
BAD_DISK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
static int bad(const char *path) {
    const char *under = getenv("BAD_DISK");
    return under && path && !strncmp(path, under, strlen(under));
}
static int is_on_it(int file) {
    char link[64], path[4096] = "";
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    return readlink(link, path, sizeof path - 1) > 0 && bad(path);
}
int link(const char *from, const char *to) {
    if (bad(to)) { errno = EPERM; return -1; }
    return REAL(link)(from, to);
}
int linkat(int d, const char *from, int e, const char *to, int flags) {
    if (bad(to)) { errno = EPERM; return -1; }
    return REAL(linkat)(d, from, e, to, flags);
}
int fsync(int file) {
    struct stat about;
    if (is_on_it(file) && !fstat(file, &about)) usleep(60000 + 30000 * (about.st_size >> 20));
    return REAL(fsync)(file);
}
static int locks(int command) { return command == F_SETLK || command == F_SETLKW; }
#define FCNTL(name) int name(int file, int command, ...) { \
    va_list more; va_start(more, command); void *argument = va_arg(more, void *); va_end(more); \
    if (locks(command) && is_on_it(file)) { errno = ENOLCK; return -1; } \
    return REAL(name)(file, command, argument); }
FCNTL(fcntl)
FCNTL(fcntl64)
"""


LOOK = """
import sys
from pathlib import Path
from pipeline.doctor.storage import storage
for finding in storage(Path(sys.argv[1])):
    print(finding.level, finding.name, finding.text, sep="|")
"""


def look(folder: Path, *around: str, **extra: str) -> Lines:
    """What the doctor says of the disk of `folder`, alone: a whole doctor imports torch and MLflow.

    `around`: what starts it.
    """
    command = [*around, sys.executable, "-c", LOOK, str(folder)]
    found = subprocess.run(command, env=environment(**extra), capture_output=True, text=True, check=True).stdout
    rows = [line.split("|", 2) for line in found.splitlines()]
    return {name: (level, text) for level, name, text in rows}


@pytest.mark.slow
@pytest.mark.machine
def test_a_disk_without_links_and_locks_that_is_slow_with_large_and_small_files_is_told_in_four_lines(
    tmp_path: Path,
) -> None:
    if not (compiler := shutil.which("cc") or shutil.which("gcc")):
        pytest.skip("no C compiler")
    (tmp_path / "bad.c").write_text(BAD_DISK)
    library, disk = tmp_path / "bad.so", tmp_path / "disk"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, tmp_path / "bad.c", "-ldl"], check=True)
    disk.mkdir()
    found = look(disk, LD_PRELOAD=str(library), BAD_DISK=str(disk))
    assert {name: level for name, (level, _) in found.items()} == {
        "disk": "warn", "small files": "warn", "locks": "FAIL", "sqlite": "warn", "clock": "ok",
    }  # fmt: skip
    assert "MB/s: checkpoints will take long, set checkpoint_every" in found["disk"][1]
    assert "prefer few large shards (prepare.shard_size)" in found["small files"][1]
    assert "expected hard links and renames, found: Operation not permitted" in found["locks"][1]
    assert "MLflow's database cannot lie here" in found["sqlite"][1]
    assert "set tracking.uri" in found["sqlite"][1]
    assert list(disk.iterdir()) == []


@pytest.mark.machine
@pytest.mark.parametrize(
    ("megabytes", "level", "told"),
    [
        (100, "warn", "0.1 GB free, writes"),
        (100, "warn", "keep 5 GB free or more"),
        (32, "FAIL", "found: No space left on device"),
    ],
)
def test_a_disk_that_is_full_or_nearly_so_is_named(tmp_path: Path, megabytes: int, level: str, told: str) -> None:
    mount = f'mount -t tmpfs -o size={megabytes}m none "$0" && exec "$@"'
    found = look(tmp_path, *namespaces(), "bash", "-c", mount, str(tmp_path))
    assert found["disk"][0] == level
    assert told in found["disk"][1]


@pytest.mark.slow
def test_a_holder_of_a_lock_that_is_stopped_and_a_locked_database_are_named(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "tiny"
    run.mkdir(parents=True)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run / "locks" / "transformer.json")],
        env=environment(), stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout
    assert holder.stdout.readline() == "held\n"
    holder.send_signal(signal.SIGSTOP)
    try:
        with closing(sqlite3.connect(run / "mlflow.db", isolation_level=None)) as database:
            database.execute("CREATE TABLE runs (x)")
            database.execute("BEGIN EXCLUSIVE")
            code, lines = consult(tmp_path, str(TINY))
    finally:
        holder.kill()
        holder.wait()
    assert f"being written now: transformer by process {holder.pid} on " in lines["run directory"][1]
    assert lines["lock transformer"][0] == "warn"
    assert f"`kill -CONT {holder.pid}`, or end it" in lines["lock transformer"][1]
    assert lines["mlflow.db"][0] == "warn"
    assert "database is locked" in lines["mlflow.db"][1]
    assert code == 0  # nothing that stops a training


def test_a_database_that_is_none_is_named(tmp_path: Path) -> None:
    config = load_pipeline(TINY, [f"runs={tmp_path}"])
    config.run_directory.mkdir()
    (config.run_directory / "mlflow.db").write_bytes(b"x" * 8192)
    finding = next(iter(runs.tracking(config)))
    assert "file is not a database: the next stage, or `smalti ui`, moves it aside and sends all again" in finding.text
