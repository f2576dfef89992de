"""One writer a stage."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pipeline.core import lock
from pipeline.core.errors import UserError
from pipeline.core.lock import Lock

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


@contextmanager
def _beating(path: Path, owner: dict[str, object], skew_s: float = 0.0) -> Iterator[None]:
    """A lock of another host, whose clock is wrong by so much, and its heartbeat."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(owner))
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(0.05):
            os.utime(path, (time.time() + skew_s, time.time() + skew_s))

    os.utime(path, (time.time() + skew_s, time.time() + skew_s))
    heart = threading.Thread(target=beat)
    heart.start()
    try:
        yield
    finally:
        ended.set()
        heart.join()


@pytest.mark.parametrize("skew_s", [0.0, -300.0, 300.0])
def test_another_hosts_lock_holds_while_its_heart_beats_whatever_its_clock_says(
    path: Path, skew_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "STALE_AFTER_S", 1.0)
    with _beating(path, {"host": "elsewhere", "pid": 1, "started": 0.0, "slurm_job": "7", "token": "t"}, skew_s):
        with pytest.raises(UserError, match="process 1 on elsewhere"), Lock(path, "it"):
            pass
        with pytest.raises(UserError, match="process 1 on elsewhere"):
            lock.refuse_if_held([path], "it")
    lock.refuse_if_held([path], "it")
    with Lock(path, "it"):
        assert json.loads(path.read_text())["host"] != "elsewhere"


def test_a_requeued_slurm_job_takes_its_own_lock_back_after_two_missed_beats(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "SAME_JOB_STALE_AFTER_S", 0.5)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with _beating(path, {"host": "node1", "pid": 1, "started": 0.0, "slurm_job": "7", "token": "t"}):
        pass
    started = time.monotonic()
    with Lock(path, "it"):
        assert 0.5 < time.monotonic() - started < lock.STALE_AFTER_S / 2
        assert json.loads(path.read_text())["host"] != "node1"


def test_a_link_that_was_made_and_said_to_exist_is_ones_own(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def retransmitted(source: Path, target: Path) -> None:
        link(source, target)
        raise FileExistsError(17, "File exists", str(target))

    monkeypatch.setattr(os, "link", retransmitted)
    with Lock(path, "it"):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert not path.exists()


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO])
def test_a_lock_that_cannot_be_read_for_a_moment_is_read_again(
    path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "_TRY_AGAIN_S", 0.05)
    failures = iter(range(4))
    read = Path.read_text

    def failing(self: Path, *args: Any, **options: Any) -> str:
        if self == path and next(failures, None) is not None:
            raise OSError(number, os.strerror(number), str(self))
        return read(self, *args, **options)

    holder = _hold_in_another_process(path)
    monkeypatch.setattr(Path, "read_text", failing)
    try:
        with pytest.raises(UserError, match=f"already being written by process {holder.pid} on "), Lock(path, "it"):
            pass
    finally:
        holder.kill()
        holder.wait()


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
def test_a_lock_file_that_is_empty_or_cut_holds_as_long_as_its_heartbeat(
    path: Path, content: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "STALE_AFTER_S", 1.0)
    with _beating(path, {}):
        path.write_text(content)
        with pytest.raises(UserError, match=r"already being written by a process that the damaged lock file does not"):
            Lock(path, "stage x").__enter__()
    with Lock(path, "stage x"):
        assert lock.owner_of(path) is not None
    assert not path.exists()


FAILING = """
import os, sys, time
from pathlib import Path
import pipeline.core.lock as lock
lock.HEARTBEAT_S, lock.STALE_AFTER_S = 0.05, float(sys.argv[2])
utime, failures = os.utime, int(sys.argv[3])
def fail(path):
    global failures
    failures -= 1
    if failures >= 0:
        raise OSError(116, "Stale file handle")
    utime(path)
os.utime = fail
with lock.Lock(Path(sys.argv[1]), "it"):
    before = os.stat(sys.argv[1]).st_mtime
    time.sleep(1.5)
    print("beaten again" if os.stat(sys.argv[1]).st_mtime > before else "no beat")
"""


def _failing(path: Path, stale_after_s: float, failures: int) -> "subprocess.CompletedProcess[str]":
    arguments = [sys.executable, "-c", FAILING, str(path), str(stale_after_s), str(failures)]
    return subprocess.run(arguments, capture_output=True, text=True)


def test_the_heart_beats_on_after_an_error_of_the_file_system(path: Path) -> None:
    done = _failing(path, 90, 3)
    assert (done.returncode, done.stdout) == (0, "beaten again\n")
    assert done.stderr.count("Stale file handle") == 1
    assert "Traceback" not in done.stderr


def test_an_owner_that_cannot_show_that_it_lives_stops_writing_before_it_is_taken_over(path: Path) -> None:
    done = _failing(path, 0.8, 1_000)
    assert (done.returncode, done.stdout) == (1, "")
    assert "ends before another one takes over" in done.stderr


def test_a_lock_that_was_removed_by_hand_is_made_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "HEARTBEAT_S", 0.05)
    with Lock(path, "it"):
        path.unlink()
        deadline = time.monotonic() + 5
        while not path.exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert not path.exists()


def test_the_processes_of_another_container_are_not_taken_for_dead(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "HEARTBEAT_S", 0.1)
    with monkeypatch.context() as container:
        container.setattr(lock, "_process_ids", lambda: "boot/1")
        held = Lock(path, "it")
        held.__enter__()
    path.write_text(path.read_text().replace(f'"pid": {os.getpid()}', '"pid": 4194304'))  # of nobody here
    with pytest.raises(UserError, match="already being written by process 4194304"), Lock(path, "it"):
        pass
    held.__exit__(None, None, None)
