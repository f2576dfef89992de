"""The ranks of a job, which srun starts, and what the first one that failed wrote."""

from __future__ import annotations

import re
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pipeline.slurm.supervisor.policy import OF_HARDWARE

# Each rank ignores the signals until Python handles them (a signal kills a Python that is still importing);
# the first to fail records its rank.
_RANK = """trap "" USR2 TERM
((SLURM_NTASKS == 1)) || export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
"$@"; code=$?
((code == 0)) || (set -C; echo "$SLURM_PROCID ${SLURMD_NODENAME:-$(hostname)} $code" >"$FIRST_FAILURE") 2>/dev/null
exit $code"""
_POLL_S = 0.2
_LOG_BYTES = 1 << 22  # of the end of the log
_LINES = 20
_LINES_WITH_STACKS = 100  # below what NCCL's watchdog says are the stacks of its threads
_ERROR = re.compile(r"^(error\b|[\w.]*(Error|Exception|Interrupt|Exit|Warning)\b|Traceback)", re.IGNORECASE)


@dataclass(frozen=True)
class FirstFailure:
    """The rank that failed first: where, with which exit code, its last lines, and the one that says why.

    `rank` is None if none could note it: then Slurm has killed the whole step, with what started the ranks.
    """

    rank: int | None = None
    host: str = ""
    code: int = 0
    lines: tuple[str, ...] = ()
    of_hardware: str = ""  # the last line that says that a machine, a link or a file system failed

    @property
    def error(self) -> str:
        """The line that says why: of a traceback the last one, of a signal its name."""
        texts = [_without_label(line) for line in self.lines]
        said = [text for text in texts if _ERROR.match(text) and not text.startswith(("Traceback", "srun: error"))]
        if self.code > 128:
            after = _without_label(self.of_hardware) or (said[-1] if said else "")
            with suppress(ValueError):
                return f"killed by {signal.Signals(self.code - 128).name}" + (f", after: {after}" if after else "")
        return said[-1] if said else next((text for text in reversed(texts) if text), "")


class Interrupt:
    """Whether Slurm asks this job to end (TERM). It does the same with the ranks, which save, and kills all soon."""

    def __init__(self) -> None:
        self.received = False
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGUSR2, lambda _number, _frame: None)  # not SIG_IGN, which srun would inherit

    def _on_signal(self, _number: int, _frame: object) -> None:
        self.received = True

    def wait(self, seconds: float) -> None:
        """Until Slurm asks this job to end, `seconds` at most."""
        deadline = time.monotonic() + seconds
        while not self.received and time.monotonic() < deadline:
            time.sleep(_POLL_S)


def run_ranks(command: Sequence[str], srun: Sequence[str], interrupt: Interrupt, on_term: Callable[[], None]) -> int:
    """Run `command` on every rank to its end; srun's exit code.

    Args:
        on_term: called once when Slurm asks this job to end; the ranks go on until they have saved, or are killed.
    """
    ranks = subprocess.Popen([*srun, "bash", "-c", _RANK, "rank", *command])
    told = False
    while True:
        with suppress(subprocess.TimeoutExpired):
            code = ranks.wait(timeout=_POLL_S)
            return 128 - code if code < 0 else code
        if interrupt.received and not told:
            told = True
            on_term()


def first_failure(record: Path, log: Path, from_byte: int, code: int) -> FirstFailure:
    """Who failed first, and its last lines in this life's part of the log; if nobody noted it, the log's last lines."""
    rank, host = None, ""
    with suppress(OSError, ValueError):
        number, host, its_code = record.read_text().split()
        rank, code = int(number), int(its_code)
    lines = _log_lines(log, from_byte)
    label = re.compile(rf"^[ 0]*{rank or 0}: ")  # of srun --label
    its_lines = [line for line in lines if label.match(line) and line.partition(": ")[2].strip()]
    said = lines if rank is None else its_lines or lines
    of_hardware = [line for line in said[-_LINES_WITH_STACKS:] if OF_HARDWARE.search(line)]
    return FirstFailure(rank, host, code, tuple(said[-_LINES:]), of_hardware[-1] if of_hardware else "")


def _without_label(line: str) -> str:
    return re.sub(r"^\s*\d+: ", "", line).strip()


def _log_lines(log: Path, from_byte: int) -> list[str]:
    try:
        with open(log, "rb") as file:
            file.seek(max(file.seek(0, 2) - _LOG_BYTES, from_byte))
            return file.read().decode(errors="replace").splitlines()
    except OSError:
        return []
