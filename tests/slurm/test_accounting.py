"""Where Slurm keeps accounts: status knows what the controller has forgotten, the doctor which accounts there are."""

from __future__ import annotations

import getpass
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import TINY
from tests.slurm.conftest import Slurm, cluster_file, start, stop, wait_until

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def accounted(slurm: Slurm) -> Iterator[Slurm]:
    if missing := [name for name in ("/usr/sbin/slurmdbd", "/usr/sbin/mariadbd") if not shutil.which(name)]:
        pytest.skip(
            f"no accounting: {', '.join(missing)} missing; `slurm/testbed install --sacct` installs it (as root)"
        )
    testbed = start("--sacct", "--set", "MinJobAge=2", "--set", "AccountingStorageEnforce=associations")
    testbed("sacctmgr", "-i", "add", "account", "ours")
    testbed("sacctmgr", "-i", "add", "user", getpass.getuser(), "account=ours")
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


def test_the_doctor_names_an_account_that_is_none_of_ours(accounted: Slurm, tmp_path: Path) -> None:
    stages = "{prepare: {account: theirs}, tokenize: {account: ours}}"
    output = accounted.smalti("doctor", "--cluster", str(cluster_file(tmp_path, stages=stages)), check=False)
    told = [line[30:].strip() for line in output.splitlines() if "cluster file" in line[:30]]
    assert [line.partition(":")[0] for line in told] == ["prepare"]
    assert "Invalid account" in told[0]
