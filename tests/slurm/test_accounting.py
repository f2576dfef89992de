"""Where Slurm keeps accounts, status still knows what the controller has forgotten."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import TINY
from tests.slurm.conftest import Slurm, cluster_file, missing_reason, start, stop, wait_until

pytestmark = pytest.mark.slurm


@pytest.fixture
def accounted() -> Iterator[Slurm]:
    if reason := missing_reason():
        pytest.skip(reason)
    if missing := [name for name in ("/usr/sbin/slurmdbd", "/usr/sbin/mariadbd") if not shutil.which(name)]:
        pytest.skip(
            f"no accounting: {', '.join(missing)} missing; `slurm/testbed install --sacct` installs it (as root)"
        )
    testbed = start("--sacct", "--set", "MinJobAge=2")
    yield testbed
    stop(testbed)


def test_status_asks_sacct_when_squeue_has_forgotten(accounted: Slurm, tmp_path: Path) -> None:
    source = "prepare.source={kind: folder, path: /nowhere/at/all}"
    accounted.smalti("submit", str(TINY), f"runs={tmp_path}", source, "--cluster", str(cluster_file(tmp_path)))
    deadline = time.monotonic() + 90
    wait_until("squeue to forget", lambda: not accounted.states(), deadline - time.monotonic())
    listed = {
        entry["stage"]: entry for entry in json.loads(accounted.smalti("status", str(tmp_path / "tiny"), "--json"))
    }
    assert listed["prepare"]["state"] == "FAILED"
    assert listed["text-tokenizer"]["state"] == "CANCELLED"
