"""What follows when a life of a job ends: a pure function of its lives. A life is one start of a job.

Budgets count lives without progress: one that brought the checkpoint's step forward sets all of them to zero.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

FINISHED = "finished"
TIME_LIMIT = "time limit"
PREEMPTED = "preempted"
ASKED_TO_STOP = "asked to stop"
BAD_HOST = "bad host"  # the preflight has named it
LATE_HOST = "late host"  # not all ranks arrived at the preflight; nothing says that a host is bad
DEAD_HOST = "dead host"
CRASH = "crash"
LOCKED = "lock held"  # by an earlier life that is still ending, or by somebody else
MISTAKE = "mistake"  # a user's, exit 2: it would only repeat
TAKEN_AWAY = "taken away"  # Slurm cancels this life, or starts the job again by itself

# What the refusal of `core/lock.py` says; it is the one exit 2 that passes by itself.
LOCK_REFUSED = "is already being written by"
_STOPS_WITHOUT_PROGRESS = 1000  # preemptions and requests are nobody's fault, and yet no reason for an endless loop
_HOST_SUSPECT_AFTER = 2  # first deaths on one host
_SAME_BUG_AFTER = 2  # crashes with one error at one step
# An error that says that a machine, a link or a file system failed is no bug, however often it is seen.
OF_HARDWARE = re.compile(
    r"uncorrectable|\bECC\b|\bXid\b|NVLink|fallen off the bus|Input/output error|Remote I/O|Stale file handle"
    r"|Connection (reset|refused|closed|timed out)|No route to host|Network is unreachable|transport endpoint"
    r"|Broken pipe|Address already in use|nccl(System|Remote)Error|unhandled system error|collective operation timeout"
    r"|\[Errno (5|116|121)\]"
    r"|processes to meet at|hangs: no sign of life for .*, in \w+, where it waits",  # rendezvous.py, watchdog.py
    re.IGNORECASE,
)


@dataclass
class Life:
    """One start of a job and its end. `outcome` is empty while it lasts, and stays so if the node or Slurm ended it."""

    job: str  # "12", "12_3"
    started: float  # seconds since the epoch
    hosts: list[str]
    progress_before: int = 0  # see `record.progress`
    progress: int = 0
    ended: float | None = None
    outcome: str = ""
    exit_code: int = 0
    blamed: list[str] = field(default_factory=list)  # hosts: bad, dead, or where the first rank failed
    rank: int | None = None  # the first that failed; of a crash None if Slurm killed the whole step
    step: int | None = None  # of a training, where it crashed
    error: str = ""  # the line that says why
    of_hardware: bool = False  # its last lines say that a machine, a link or a file system failed

    @property
    def advanced(self) -> bool:
        return self.progress > self.progress_before


@dataclass(frozen=True)
class Budgets:
    """How often each may happen without progress; the job fails at one more."""

    max_time_limits: int = 3
    max_crashes: int = 3
    max_bad_hosts: int = 3
    of_array: bool = False  # of a task of an array; its `max_crashes` is `max_task_retries` in the cluster file

    def of(self, outcome: str) -> tuple[str, int]:
        """The budget that an outcome spends: its name in the cluster file, and how much it is."""
        if outcome == TIME_LIMIT:
            return "max_time_limits", self.max_time_limits
        if outcome == LOCKED and self.of_array:  # by the stage itself, or by another array
            return "", _STOPS_WITHOUT_PROGRESS
        if outcome in (CRASH, LOCKED):
            return "max_task_retries" if self.of_array else "max_crashes", self.max_crashes
        if outcome in (BAD_HOST, LATE_HOST, DEAD_HOST):
            return "max_bad_hosts", self.max_bad_hosts
        return "", _STOPS_WITHOUT_PROGRESS


@dataclass(frozen=True)
class Decision:
    """What to do: "done", "again" (requeue, or a successor where that is forbidden), "fail", or "leave" to Slurm."""

    action: str
    line: str = ""
    exclude: tuple[str, ...] = ()
    exit_code: int = 0


@dataclass(frozen=True)
class Ending:
    """What is known when the ranks have ended, or were interrupted by the end of the job."""

    finished: bool  # there is a `_SUCCESS` that this life made or found up to date
    code: int  # of the rank that failed first; else srun's, which is that of any rank
    job_state: str = "RUNNING"
    at_time_limit: bool = False  # Slurm says that this is why it ends the job
    near_time_limit: bool = False
    preempted: bool = False
    dead_hosts: tuple[str, ...] = ()
    said: str = ""  # what the first rank that failed wrote last
    error: str = ""  # the line of that which says why


def outcome_of(ending: Ending) -> str:
    """What ended a life whose stage has begun."""
    if ending.finished:
        return FINISHED
    if ending.at_time_limit:
        return TIME_LIMIT
    if ending.job_state != "RUNNING":
        return TAKEN_AWAY
    if ending.code == 0:  # stopped on request
        if ending.preempted:
            return PREEMPTED
        return TIME_LIMIT if ending.near_time_limit else ASKED_TO_STOP
    if ending.dead_hosts:
        return DEAD_HOST
    if ending.code == 2 and LOCK_REFUSED in ending.said:
        return LOCKED
    return MISTAKE if ending.code == 2 and not OF_HARDWARE.search(ending.error) else CRASH


def decide(lives: Sequence[Life], budgets: Budgets, spare_hosts: int | None = None) -> Decision:
    """What to do after the last of `lives`, which are those of one job and of those that it succeeded, oldest first.

    Args:
        spare_hosts: how many hosts the job may lose and still start; None: not known.
    """
    life = lives[-1]
    if life.outcome == FINISHED:
        return Decision("done")
    if life.outcome == TAKEN_AWAY:
        return Decision("leave", exit_code=life.exit_code or 75)
    if life.outcome == MISTAKE:
        return Decision("fail", f"failed: {life.error}", exit_code=life.exit_code)
    if bug := _repeated_error(lives):
        return Decision("fail", bug, exit_code=life.exit_code or 1)
    spent = count_without_progress(lives, budgets)
    name, allowed = budgets.of(life.outcome)
    if spent > allowed:
        of_crash = life.outcome == CRASH
        line = f"failed: {_who(life)}" if of_crash else f"{life.outcome}{_which(life)}"
        if allowed or not of_crash:
            line += f", occurrence {spent} without progress: the cluster file allows {allowed} ({name})"
        return Decision("fail", line, exit_code=life.exit_code if of_crash else 75)
    exclude = _to_exclude(lives)
    line = f"{life.outcome}{_which(life)}"
    if exclude and spare_hosts is not None and len(exclude) > spare_hosts:
        return Decision("again", f"{line}; {', '.join(exclude)} would be left out, but too few other hosts are up")
    if exclude and life.outcome == CRASH:
        line += f"; {', '.join(exclude)} is left out after {_HOST_SUSPECT_AFTER} first failures there"
    return Decision("again", line, exclude)


def count_without_progress(lives: Sequence[Life], budgets: Budgets) -> int:
    """How many lives since the last one with progress spent the budget that the last life spends; with progress, 0."""
    name, _ = budgets.of(lives[-1].outcome)
    count = 0
    for life in reversed(lives):
        if life.advanced:
            break
        count += bool(life.outcome) and budgets.of(life.outcome)[0] == name
    return count


def _repeated_error(lives: Sequence[Life]) -> str | None:
    """The line for a crash that was here before, at the same step with the same error; None for any other end."""
    life = lives[-1]
    if life.outcome != CRASH or life.rank is None or not life.error or life.of_hardware:
        return None
    same = [other for other in lives if other.outcome == CRASH and _place(other) == _place(life)]
    if sum(_shape(other.error) == _shape(life.error) for other in same) < _SAME_BUG_AFTER:
        return None
    where = "" if life.step is None else f" at step {life.step}"
    return f"failed: {_who(life)}, as before{where}: {life.error} (the same error in the same place is no accident)"


def _place(life: Life) -> tuple[int | None, int]:
    """Where it crashed: at a step, however far the checkpoints had come; where there are no steps, how far it came."""
    return (None, life.progress) if life.step is None else (life.step, 0)


def _shape(error: str) -> str:
    """An error without what differs from life to life: addresses, and process ids and times in long numbers."""
    return re.sub(r"0x[0-9a-f]+|\d{4,}", "#", error)


def _to_exclude(lives: Sequence[Life]) -> tuple[str, ...]:
    """The hosts that the next life does without. Lateness alone excludes none; Slurm knows of dead ones by itself."""
    life = lives[-1]
    if life.outcome == BAD_HOST:
        return tuple(life.blamed)
    if life.outcome != CRASH:
        return ()
    first_deaths = [host for other in lives if other.outcome == CRASH for host in other.blamed]
    return tuple(host for host in life.blamed if first_deaths.count(host) >= _HOST_SUSPECT_AFTER)


def _who(life: Life) -> str:
    if life.rank is None:
        return f"the whole step was killed (exit {life.exit_code})"
    host = f" on {life.blamed[0]}" if life.blamed else ""
    return f"rank {life.rank}{host} failed first (exit {life.exit_code})"


def _which(life: Life) -> str:
    if life.outcome == CRASH:
        return f" ({_who(life)}{f': {life.error}' if life.error else ''})"
    return f" ({','.join(life.blamed)})" if life.blamed else ""
