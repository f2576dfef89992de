"""One writer a stage."""

import errno
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any

import pytest

from pipeline.core import lock, signals
from pipeline.core.errors import StoppedOnRequest, UserError
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


class AnotherHost:
    """A lock of another host, whose clock may be wrong, and a clock of ours that runs only while we sleep."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path, self.now_s, self.beats, self.skew_s = path, 0.0, False, 0.0
        ours = SimpleNamespace(monotonic=lambda: self.now_s, sleep=self._sleep, time=time.time)
        monkeypatch.setattr(lock, "time", ours)
        monkeypatch.setattr(lock, "_POLL_S", 0.5)

    def hold(self, content: str, skew_s: float = 0.0) -> None:
        """Write the lock file, and keep its heart beating until `die`."""
        self.path.parent.mkdir(exist_ok=True)
        self.path.write_text(content)
        self.beats, self.skew_s = True, skew_s
        self._beat()

    def die(self) -> None:
        self.beats = False

    def _sleep(self, seconds: float) -> None:
        before, self.now_s = self.now_s, self.now_s + seconds
        if self.beats and before // lock.HEARTBEAT_S != self.now_s // lock.HEARTBEAT_S:
            self._beat()

    def _beat(self) -> None:
        beaten_s = 1_700_000_000 + self.now_s + self.skew_s
        os.utime(self.path, (beaten_s, beaten_s))


@pytest.fixture
def elsewhere(path: Path, monkeypatch: pytest.MonkeyPatch) -> AnotherHost:
    return AnotherHost(path, monkeypatch)


def _owner(host: str = "elsewhere") -> str:
    return json.dumps({"host": host, "pid": 1, "started": 0.0, "slurm_job": "7", "token": "t"})


@pytest.mark.parametrize("skew_s", [0.0, -300.0, 300.0])
def test_another_hosts_lock_holds_while_its_heart_beats_whatever_its_clock_says(
    path: Path, skew_s: float, elsewhere: AnotherHost
) -> None:
    elsewhere.hold(_owner(), skew_s)
    for wait_s in (0.0, 3 * lock.STALE_AFTER_S):
        with pytest.raises(UserError, match="process 1 on elsewhere"), Lock(path, "it", wait_s):
            pass
        with pytest.raises(UserError, match="process 1 on elsewhere"):
            lock.refuse_if_held([path], "it", wait_s)
    elsewhere.die()
    died_s = elsewhere.now_s
    lock.refuse_if_held([path], "it")
    assert lock.STALE_AFTER_S - lock.HEARTBEAT_S < elsewhere.now_s - died_s < lock.STALE_AFTER_S + 1
    with Lock(path, "it"):
        assert json.loads(path.read_text())["host"] != "elsewhere"


def test_a_requeued_slurm_job_takes_its_own_lock_back_sooner_but_not_before_its_owner_has_stopped(
    path: Path, elsewhere: AnotherHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    elsewhere.hold(_owner("node1"))
    elsewhere.die()
    with Lock(path, "it"):
        assert lock.STALE_AFTER_S / 2 + lock.HEARTBEAT_S < elsewhere.now_s < lock.STALE_AFTER_S - lock.HEARTBEAT_S
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


@pytest.mark.slow
def test_a_process_that_was_stopped_for_long_goes_on_where_nobody_has_taken_its_lock(path: Path) -> None:
    short = HOLDER.replace(
        "from pipeline.core.lock import Lock",
        "import pipeline.core.lock as lock; Lock = lock.Lock; lock.HEARTBEAT_S, lock.STALE_AFTER_S = 0.5, 2.0\n"
        "import os, signal; signal.signal(signal.SIGCONT, lambda *_: None)\n"  # so that no handler of ours looks first
        "utime = os.utime; os.utime = lambda path: (time.sleep(0.1), utime(path))",  # nor the heart before the watch
    )
    holder = subprocess.Popen([sys.executable, "-c", short, str(path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    holder.send_signal(signal.SIGSTOP)
    time.sleep(2.5)
    beaten_before = path.stat().st_mtime_ns
    holder.send_signal(signal.SIGCONT)
    deadline = time.monotonic() + 10
    while path.stat().st_mtime_ns == beaten_before:
        assert holder.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    holder.kill()
    holder.wait()


@pytest.mark.slow
def test_waiting_for_a_lock_ends_when_it_is_released(path: Path) -> None:
    holder = _hold_in_another_process(path)
    with pytest.raises(UserError, match="already being written"), Lock(path, "it", wait_s=0.6):
        pass
    threading.Timer(0.2, holder.terminate).start()
    with Lock(path, "it", wait_s=20):
        pass
    holder.wait()


@pytest.mark.parametrize("content", ["", '{"host": "a', "[]", "{}", "null"])
def test_a_lock_file_that_is_empty_or_cut_holds_as_long_as_its_heartbeat(
    path: Path, content: str, elsewhere: AnotherHost
) -> None:
    elsewhere.hold(content)
    with pytest.raises(UserError, match=r"already being written by a process that the damaged lock file does not"):
        Lock(path, "stage x").__enter__()
    elsewhere.die()
    with Lock(path, "stage x"):
        assert lock.owner_of(path) is not None
    assert not path.exists()


def test_an_owner_that_beats_again_at_the_last_moment_keeps_its_lock(path: Path, elsewhere: AnotherHost) -> None:
    elsewhere.hold(_owner())
    elsewhere.die()
    contender, removed = Lock(path, "it"), Lock._remove_stale

    def too_late(lock: Lock, *found: Any) -> None:
        elsewhere.hold(_owner())  # between the decision of the other and its deed
        removed(lock, *found)

    contender._remove_stale = MethodType(too_late, contender)  # type: ignore[method-assign]
    with pytest.raises(UserError, match="process 1 on elsewhere"), contender:
        pass
    assert path.read_text() == _owner()


@pytest.mark.parametrize("late_s", [0.0, 0.3])  # that the third looks again: before and after it is given back
def test_of_three_that_find_a_dead_owners_lock_the_first_keeps_it(
    path: Path, late_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second moves the first one's new lock away by mistake; the third makes it before that is given back."""
    holder = _hold_in_another_process(path)
    holder.kill()
    holder.wait()
    second, entered = Lock(path, "it"), threading.Event()
    removed, read, holder_of = Lock._remove_stale, lock._read_patiently, Lock._holder
    monkeypatch.setattr(Lock, "_holder", lambda contender: (time.sleep(late_s), holder_of(contender))[1])

    def come_third() -> None:
        with suppress(UserError), Lock(path, "it"):
            entered.set()

    thread = threading.Thread(target=come_third)

    def read_while_the_third_comes(asked: Path) -> lock.Owner | None:
        found = read(asked)
        if asked.suffix == ".stale" and not thread.ident:
            thread.start()
            while not (path.exists() or entered.is_set()):
                time.sleep(0.001)
        return found

    def too_late(contender: Lock, *found: Any) -> None:
        path.write_text(json.dumps(lock._this_process("first")))
        removed(contender, *found)

    monkeypatch.setattr(lock, "_read_patiently", read_while_the_third_comes)
    monkeypatch.setattr(second, "_remove_stale", MethodType(too_late, second))
    with pytest.raises(UserError, match=f"process {os.getpid()} on "), second:
        pass
    thread.join()
    assert not entered.is_set()
    assert json.loads(path.read_text())["token"] == "first"


def test_an_owner_whose_lock_is_moved_away_by_mistake_waits_until_it_has_it_back(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    with Lock(path, "it") as held:
        stale = path.with_name(".stage.json.other.stale")
        path.rename(stale)
        path.write_text(_owner())
        threading.Timer(0.3, lambda: stale.replace(path)).start()
        held.beat_or_end()
        assert not ended
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_what_a_process_has_left_that_died_while_it_took_over_holds_nobody_up_for_long(
    path: Path, elsewhere: AnotherHost
) -> None:
    path.parent.mkdir()
    (path.parent / ".stage.json.dead.stale").write_text(_owner())
    with Lock(path, "it"):
        assert elsewhere.now_s < lock.STALE_AFTER_S / 2
    assert list(path.parent.iterdir()) == []


def test_who_waits_as_long_as_it_takes_can_be_asked_to_stop(
    path: Path, elsewhere: AnotherHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere.hold(_owner())
    monkeypatch.setattr(signals, "check", lambda: _stop_after(elsewhere, 3 * lock.STALE_AFTER_S))
    with pytest.raises(StoppedOnRequest), Lock(path, "it", math.inf):
        pass
    with pytest.raises(StoppedOnRequest):
        lock.refuse_if_held([path], "it", math.inf)


def _stop_after(elsewhere: AnotherHost, seconds: float) -> None:
    if elsewhere.now_s > seconds:
        raise StoppedOnRequest("asked to stop")


FAILING = """
import os, sys, time
from pathlib import Path
import pipeline.core.lock as lock
lock.HEARTBEAT_S, lock.STALE_AFTER_S = 0.05, float(sys.argv[2])
utime, read, failures, kind = os.utime, Path.read_text, int(sys.argv[3]), sys.argv[4]
def failed():
    global failures
    failures -= 1
    return failures >= 0
def beat(path):
    if kind == "silent" and failed():
        time.sleep(15)
    if kind != "damaged" and failed():
        raise OSError(int(kind), os.strerror(int(kind)))
    utime(path)
def read_text(path, *args, **options):
    text = read(path, *args, **options)
    return text[:9] if kind == "damaged" and path.name == "stage.json" and failed() else text
os.utime, Path.read_text = beat, read_text
with lock.Lock(Path(sys.argv[1]), "it"):
    before = os.stat(sys.argv[1]).st_mtime
    for _ in range(500):
        time.sleep(0.02)
        if failures < 0 and os.stat(sys.argv[1]).st_mtime > before:
            print("beaten again")
            break
"""


def _failing(path: Path, stale_after_s: float, failures: int, kind: str) -> "subprocess.CompletedProcess[str]":
    """`kind`: the number of the error of each of the first beats; or "damaged": what they read is no owner; or
    "silent": they hang, as where a server does not answer."""
    arguments = [sys.executable, "-c", FAILING, str(path), str(stale_after_s), str(failures), kind]
    return subprocess.run(arguments, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("kind", "told"),
    [(str(errno.ESTALE), "Stale file handle"), (str(errno.EIO), "Input/output error"), ("damaged", "it is damaged")],
)
def test_the_heart_beats_on_after_an_error_of_the_file_system(path: Path, kind: str, told: str) -> None:
    done = _failing(path, 90, 3, kind)
    assert (done.returncode, done.stdout) == (0, "beaten again\n")
    assert done.stderr.count(told) == 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("kind", [str(errno.ESTALE), "damaged", "silent"])
def test_an_owner_that_cannot_show_that_it_lives_stops_writing_before_it_is_taken_over(path: Path, kind: str) -> None:
    done = _failing(path, 0.8, 1_000, kind)
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
