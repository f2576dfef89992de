"""One writer a stage."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipeline.core import lock
from pipeline.core.errors import UserError
from pipeline.core.lock import STALE_AFTER_S, Lock, owner_of

HOLDER = """
import sys, time
from pathlib import Path
from pipeline.core.lock import Lock
with Lock(Path(sys.argv[1]), "it"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "locks" / "stage.json"


def _hold_in_another_process(path: Path) -> "subprocess.Popen[str]":
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    return holder


def test_a_second_process_is_refused_and_told_who_holds_it(path: Path) -> None:
    holder = _hold_in_another_process(path)
    try:
        with pytest.raises(UserError, match=f"already being written by process {holder.pid} on "), Lock(path, "it"):
            pass
    finally:
        holder.kill()
        holder.wait()


def test_the_lock_of_a_killed_process_is_taken_over_at_once(path: Path) -> None:
    holder = _hold_in_another_process(path)
    holder.send_signal(signal.SIGKILL)
    with Lock(path, "it"):  # the holder is still a zombie here: nobody has waited for it
        assert json.loads(path.read_text())["pid"] == os.getpid()
    holder.wait()
    assert not path.exists()


def test_another_hosts_lock_holds_while_its_heart_beats(path: Path) -> None:
    path.parent.mkdir()
    owner = {"host": "elsewhere", "pid": 1, "started": 0.0, "slurm_job": "7", "token": "t"}
    path.write_text(json.dumps(owner))
    with pytest.raises(UserError, match="process 1 on elsewhere"), Lock(path, "it"):
        pass
    long_ago = time.time() - 2 * lock.STALE_AFTER_S
    os.utime(path, (long_ago, long_ago))
    with Lock(path, "it"):
        assert json.loads(path.read_text())["host"] != "elsewhere"


def test_a_requeued_slurm_job_takes_its_own_lock_back_after_two_missed_beats(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path.parent.mkdir()
    path.write_text(json.dumps({"host": "node1", "pid": 1, "started": 0.0, "slurm_job": "7", "token": "t"}))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    recently = time.time() - lock.SAME_JOB_STALE_AFTER_S + 1
    os.utime(path, (recently, recently))
    with Lock(path, "it"):
        assert time.time() > recently + lock.SAME_JOB_STALE_AFTER_S
        assert json.loads(path.read_text())["host"] != "node1"


def test_a_process_that_slept_through_its_lock_does_not_go_on_writing(path: Path) -> None:
    short = HOLDER.replace(
        "from pipeline.core.lock import Lock",
        "import pipeline.core.lock as lock; Lock = lock.Lock; lock.HEARTBEAT_S = 0.2",
    )
    holder = subprocess.Popen([sys.executable, "-c", short, str(path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    holder.send_signal(signal.SIGSTOP)
    path.unlink()
    with Lock(path, "it"):  # somebody else, long after
        holder.send_signal(signal.SIGCONT)
        assert holder.wait(10) == 1


def test_waiting_for_a_lock_ends_when_it_is_released(path: Path) -> None:
    holder = _hold_in_another_process(path)
    with pytest.raises(UserError, match="already being written"), Lock(path, "it", wait_s=0.5):
        pass
    threading.Timer(0.5, holder.terminate).start()
    with Lock(path, "it", wait_s=20):
        pass
    holder.wait()


@pytest.mark.parametrize("content", ["", '{"host": "a', "[]", "{}", "null"])
def test_a_lock_file_that_is_empty_or_cut_holds_as_long_as_its_heartbeat(tmp_path: Path, content: str) -> None:
    path = tmp_path / "stage.json"
    path.write_text(content)
    with pytest.raises(
        UserError, match=r"stage x is already being written by a process that the damaged lock file does not name"
    ):
        Lock(path, "stage x").__enter__()
    long_ago = time.time() - STALE_AFTER_S - 1
    os.utime(path, (long_ago, long_ago))
    with Lock(path, "stage x"):
        assert owner_of(path) is not None
    assert not path.exists()
