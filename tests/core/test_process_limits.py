"""A process uses what it is given: processors by affinity, quota and neighbors, and as many open files as it may."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.core import process_limits


@pytest.fixture
def _file_limits() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize(
    ("affinity", "files", "local", "expected"),
    [
        (8, {}, None, 8),
        (8, {"cpu.max": "max 100000"}, None, 8),
        (8, {"cpu.max": "350000 100000"}, None, 3),
        (8, {"cpu.max": "50000 100000"}, None, 1),
        (2, {"cpu.max": "800000 100000"}, None, 2),
        (8, {"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, None, 4),
        (8, {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None, 8),
        (8, {}, "4", 2),
        (2, {}, "4", 1),
    ],
)
def test_processors_are_those_of_affinity_quota_and_share(
    affinity: int,
    files: dict[str, str],
    local: str | None,
    expected: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(affinity)))
    monkeypatch.setattr(process_limits, "_CGROUP", tmp_path)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    if local:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    else:
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert process_limits.processors() == expected


@pytest.mark.usefixtures("_file_limits")
def test_the_soft_limit_of_open_files_becomes_the_hard_one() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    assert process_limits.open_files() == 1024
    process_limits.raise_open_files()
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)


def test_no_limit_of_open_files_is_a_large_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert process_limits.open_files() > 100_000
