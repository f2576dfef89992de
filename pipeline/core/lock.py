"""One writer per stage: a lock file that names its owner and is kept alive by a heartbeat.

    with Lock(path, "stage transformer"):
        …

A lock whose owner is gone is taken over: at once when the owner is a dead process of this machine, else when this
process itself has seen no beat for `STALE_AFTER_S`, whatever the clocks of other hosts say, or a little sooner when the
owner is an earlier start of the same Slurm job, on another node. A process that finds its lock taken
over ends itself at once: it was asleep for that long, and another one writes now. One that cannot beat for half of
`STALE_AFTER_S`, whatever the file system answers or if it never does, ends itself too, before another one may take
over; one that was stopped (SIGSTOP, Ctrl-Z) looks before it does anything else.

Why not filelock's lease (SoftFileLease, 4.2): an owner that was stopped, then continued, writes beside the new one
until its next heartbeats, and a killed process that nobody has waited for (a zombie, as stages are for a moment)
counts as alive; it knows nothing of Slurm's jobs.
"""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Literal, TypedDict, cast

import psutil

from pipeline.core import signals
from pipeline.core.errors import UserError

log = logging.getLogger(__name__)

HEARTBEAT_S = 10.0
STALE_AFTER_S = 90.0
SAME_JOB_STALE_AFTER_S = 60.0  # its owner has stopped by then: half of the other, two beats and a second
_DYING_S = 0.5  # a process of this machine may just be dying
_SILENT_S = 5.0  # seconds of waiting before a line says so
_MOVED_S = 30.0  # that a process takes at most, on a slow file system, to look at what it has moved away
_POLL_S = 0.1
_TRIES, _TRY_AGAIN_S = 10, 0.5


class Owner(TypedDict):
    """The content of a lock file: the process that holds it."""

    host: str
    pid: int
    started: float  # seconds since the epoch; tells processes of the same id apart
    slurm_job: str | None
    token: str  # of the `Lock` object
    processes: str  # which process ids it is among: start of the machine and pid namespace; "": not known


class Lock:
    """A lock file, held inside of `with`.

    Raises on entry UserError if another process holds it; StoppedOnRequest if this one is asked to stop while it waits
    for as long as it takes (`wait_s` infinite).
    """

    def __init__(self, path: Path, what: str, wait_s: float = 0.0) -> None:
        """
        Args:
            path: the lock file.
            what: what is locked, for messages: "stage transformer".
            wait_s: how long to wait for another owner to release it.
        """
        self.path = path
        self.what = what
        self.wait_s = wait_s
        self._token = uuid.uuid4().hex
        self._released = threading.Event()
        self._beating = threading.RLock()  # a signal may come while its thread holds it
        self._beaten, self._told = time.monotonic(), False
        self._process = os.getpid()

    def __enter__(self) -> Lock:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        watch, started, told = _Watch(self.path), time.monotonic(), False
        while not self._create():
            owner = _read_patiently(self.path)
            if owner is None:
                continue  # released between our two looks
            state = watch.state(owner)
            if state == "gone":
                self._remove_stale(owner, watch.last_beat_ns)
                continue
            waited_s = time.monotonic() - started
            # An earlier start of this job may beat on for a while, on a node that Slurm has lost sight of.
            patience_s = max(self.wait_s, SAME_JOB_STALE_AFTER_S + 5 if _is_same_job(owner) else _DYING_S)
            if state == "alive" and waited_s >= patience_s:
                raise _refusal(self.what, owner, self.path)
            if waited_s > _SILENT_S and not told:
                log.info("%s: its lock is held by %s: waiting", self.what, _named(owner))
                told = True
            _pause(self.wait_s)
        self._beaten = time.monotonic()
        _held.add(self)
        _look_when_continued()
        threading.Thread(target=self._keep_alive, name="lock heartbeat", daemon=True).start()
        threading.Thread(target=self._end_if_silent, name="lock watch", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._released.set()
        _held.discard(self)
        with self._beating:
            owner = self._holder()
            if owner and owner["token"] == self._token:
                self.path.unlink(missing_ok=True)

    def _create(self) -> bool:
        """Make the lock file whole in one step: a link to a finished file, which fails if the name is taken."""
        draft = self.path.with_name(f".{self.path.name}.{self._token}")
        draft.write_text(json.dumps(_this_process(self._token)))
        try:
            os.link(draft, self.path)
        except FileExistsError:
            # A network file system may answer so to a link that it has made.
            owner = _read_patiently(self.path)
            return bool(owner and owner["token"] == self._token)
        finally:
            draft.unlink()
        owner = self._holder()
        return bool(owner and owner["token"] in (self._token, ""))

    def _remove_stale(self, owner: Owner, last_beat_ns: int | None) -> None:
        """Move a dead owner's lock away. Of two processes that try, the rename lets one win."""
        stale = self.path.with_name(f".{self.path.name}.{self._token}.stale")
        try:
            self.path.rename(stale)
        except FileNotFoundError:
            return
        moved = _read_patiently(stale)
        # Another process was quicker and holds it now, or the owner has beaten once more: give it back, whoever has
        # made it anew in this moment, since that one looks again.
        with suppress(FileNotFoundError):
            if moved and (moved["token"] != owner["token"] or last_beat_ns not in (None, _beaten_ns(stale))):
                stale.replace(self.path)
            else:
                stale.unlink()

    def _holder(self) -> Owner | None:
        """Who holds the lock, once nobody has it moved away any more, who may have to give it back."""
        since = time.monotonic()
        while moved := list(self.path.parent.glob(f".{self.path.name}.*.stale")):
            if time.monotonic() - since > _MOVED_S:  # by a process that died there
                for stale in moved:
                    stale.unlink(missing_ok=True)
            time.sleep(_POLL_S)
        return _read_patiently(self.path)

    def _keep_alive(self) -> None:
        while not self._released.wait(HEARTBEAT_S):
            self.beat_or_end()

    def _end_if_silent(self) -> None:
        """Beside the heartbeat, which a file system that does not answer (an NFS server is away) may hold for hours."""
        looked = time.monotonic()
        while not self._released.wait(HEARTBEAT_S):
            # All of this process was stopped for longer than that: the heartbeat looks first.
            was_stopped = time.monotonic() - looked > 2 * HEARTBEAT_S + 1
            looked = time.monotonic()
            if not was_stopped and self._process == os.getpid():
                self._end_after_silence()

    def beat_or_end(self) -> None:
        """Show that the owner lives; end this process if that failed for so long that another one may take over."""
        try:
            with self._beating:
                self._beat()
            self._told = False
            return
        except (OSError, ValueError) as error:  # of a network file system, now and then
            if not self._told:
                log.warning("%s: the heartbeat of its lock %s failed (%s): trying on", self.what, self.path, error)
            self._told = True
        self._end_after_silence()

    def _end_after_silence(self) -> None:
        if self._silent_s() > STALE_AFTER_S / 2:
            threading.Timer(1.0, os._exit, (1,)).start()  # the log may lie on a file system that does not answer
            log.critical(
                "%s: no heartbeat of %s for %.0f s: this process ends before another one takes over",
                self.what,
                self.path,
                self._silent_s(),
            )
            os._exit(1)

    def _silent_s(self) -> float:
        return time.monotonic() - self._beaten

    def _beat(self) -> None:
        """Show that the owner lives. Raises OSError or ValueError when that cannot be shown."""
        if self._released.is_set() or self._process != os.getpid():
            return
        with suppress(FileNotFoundError):
            os.utime(self.path)
        # Looked at only now: who finds it stale before the beat, and moves it away after it, gives it back.
        owner = _read(self.path)
        if owner is None and not self._create():  # removed by hand, or another process is just moving it
            owner = _read(self.path)
        if owner and not owner["token"]:
            raise ValueError("it is damaged")
        if owner and owner["token"] != self._token:
            owner = self._holder()
        if owner and owner["token"] not in (self._token, ""):
            log.critical("%s was taken over by %s: this process was asleep, and ends", self.what, _named(owner))
            os._exit(1)
        self._beaten = time.monotonic()


_held: set[Lock] = set()


def _look_when_continued() -> None:
    """From now on a process that continues after a stop (SIGSTOP, Ctrl-Z) beats or ends before it writes anything."""
    # Only a main thread may set it; what somebody else has set stays.
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGCONT) == signal.SIG_DFL:
        signal.signal(signal.SIGCONT, _on_continue)


def _on_continue(_number: int, _frame: FrameType | None) -> None:
    for lock in list(_held):
        lock.beat_or_end()


class _Watch:
    """What this process has seen of a lock that others hold."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._last: tuple[str, int | None] | None = None
        self._since = time.monotonic()  # by this process's own clock
        self._beats = 0

    @property
    def last_beat_ns(self) -> int | None:
        """The newest beat that was seen, by the owner's clock; None: none was looked for."""
        return self._last[1] if self._last else None

    def state(self, owner: Owner) -> Literal["alive", "gone", "unknown"]:
        """Whether `owner`, which the lock names now, lives; unknown: nothing tells yet."""
        if (lives := _lives_here(owner)) is not None:
            return "alive" if lives else "gone"
        now, seen = time.monotonic(), (owner["token"], _beaten_ns(self.path))
        if seen[1] is not None and seen != self._last:
            # Another owner's beats say nothing of this one.
            self._beats = self._beats + 1 if self._last and self._last[0] == seen[0] else 0
            self._last, self._since = seen, now
        # Slurm runs a job once at a time, but a node that it has lost sight of may keep running for a while.
        if now - self._since > (SAME_JOB_STALE_AFTER_S if _is_same_job(owner) else STALE_AFTER_S):
            return "gone"
        return "alive" if self._beats else "unknown"


def owner_of(path: Path) -> Owner | None:
    """The process that holds the lock at `path` and lives, as far as one look tells; None if there is none.

    For what is shown: of other machines' processes it compares clocks.
    """
    owner = _read(path)
    if owner is None:
        return None
    lives = _lives_here(owner)
    return owner if lives or (lives is None and _heartbeat_age_s(path) <= STALE_AFTER_S) else None


def refuse_if_held(paths: Sequence[Path], what: str, wait_s: float = 0.0) -> None:
    """Raises UserError if another process holds one of these locks. `what` is locked, for the message.

    Watches those of other machines until a beat, or the lack of one, tells; waits `wait_s` for one that is held.
    """
    watched, started, told = [(path, _Watch(path)) for path in paths], time.monotonic(), False
    while watched:
        held = []
        for path, watch in watched:
            owner = _read_patiently(path)
            state = watch.state(owner) if owner else "gone"
            waited_s = time.monotonic() - started
            if owner and state == "alive" and waited_s >= wait_s:
                raise _refusal(what, owner, path)
            if owner and state != "gone":
                held.append((path, watch))
                if waited_s > _SILENT_S and not told:
                    log.info("%s: its lock is held by %s: waiting", what, _named(owner))
                    told = True
        watched = held
        if watched:
            _pause(wait_s)


def _pause(wait_s: float) -> None:
    if wait_s == math.inf:  # shorter waits end by themselves
        signals.check()
    time.sleep(_POLL_S)


def _refusal(what: str, owner: Owner, path: Path) -> UserError:
    return UserError(
        f"{what} is already being written by {_named(owner)}"
        f" (last heartbeat {_heartbeat_age_s(path):.0f} s ago, {path}): wait for it, or stop it and run again"
    )


def _named(owner: Owner) -> str:
    if not owner["token"]:
        return "a process that the damaged lock file does not name"
    job = f" (Slurm job {owner['slurm_job']})" if owner["slurm_job"] else ""
    return f"process {owner['pid']} on {owner['host']}{job}"


def _read(path: Path) -> Owner | None:
    try:
        found = json.loads(path.read_text())
        known = {"processes": ""} | found  # locks of versions before do not say it
        return cast(Owner, {name: known[name] for name in Owner.__annotations__})
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        # Locks are made whole, so a machine went down while it was written, or somebody made it: the heartbeat decides.
        return {"host": "", "pid": 0, "started": 0.0, "slurm_job": None, "token": "", "processes": ""}


def _read_patiently(path: Path) -> Owner | None:
    """Like `_read`; what a network file system answers now and then (ESTALE, EIO) is asked again."""
    for _ in range(_TRIES - 1):
        try:
            return _read(path)
        except OSError:
            time.sleep(_TRY_AGAIN_S)
    return _read(path)


def _beaten_ns(path: Path) -> int | None:
    """When the owner said to have beaten last, by whichever clock: only a change of it counts. None: not known now."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


def _heartbeat_age_s(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _this_process(token: str) -> Owner:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "token": token,
        "processes": _process_ids(),
    }


def _process_ids() -> str:
    """What the process ids of this machine, or of this container on it, are told apart by; "" where nothing tells."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def _is_same_job(owner: Owner) -> bool:
    job = os.environ.get("SLURM_JOB_ID")
    return job is not None and owner["slurm_job"] == job


def _lives_here(owner: Owner) -> bool | None:
    """Whether the owner is a living process of this machine; None if it is one of another, or of another container."""
    # Two containers may have one host name, and each knows its own processes alone.
    if owner["host"] != socket.gethostname() or owner["processes"] not in ("", _process_ids()):
        return None
    try:
        process = psutil.Process(owner["pid"])
        # A process id may have been given to another process since; a zombie only waits to be reaped.
        reused = abs(process.create_time() - owner["started"]) > 1.0
        return not reused and bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
