"""One writer a stage: a lock file that names its owner and is kept alive by a heartbeat.

A lock whose owner is gone is taken over: at once when the owner is a dead process of this machine
or an earlier life of the same Slurm job, else when its heartbeat is older than `STALE_AFTER_S`.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from pipeline.errors import UserError

HEARTBEAT_S = 10.0
STALE_AFTER_S = 90.0


class Lock:
    """`with Lock(path, "stage transformer"):` - raises UserError if somebody else holds it."""

    def __init__(self, path: Path, what: str) -> None:
        self.path = path
        self.what = what
        self._token = uuid.uuid4().hex
        self._released = threading.Event()

    def __enter__(self) -> Lock:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while not self._create():
            owner = self._read()
            if owner is None:
                continue  # released between our two looks
            age_s = self._heartbeat_age_s()
            if not _is_gone(owner, age_s):
                raise UserError(
                    f"{self.what} is already being written by process {owner['pid']} on {owner['host']}"
                    f" (last heartbeat {age_s:.0f} s ago, {self.path}): wait for it, or stop it and run again"
                )
            self._break(owner)
        threading.Thread(target=self._beat, name="lock heartbeat", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._released.set()
        owner = self._read()
        if owner and owner["token"] == self._token:
            self.path.unlink(missing_ok=True)

    def _create(self) -> bool:
        """Make the lock file whole in one step: a link to a finished file, which fails if the name is taken."""
        draft = self.path.with_name(f".{self.path.name}.{self._token}")
        draft.write_text(json.dumps(_this_process() | {"token": self._token}))
        try:
            os.link(draft, self.path)
        except FileExistsError:
            return False
        finally:
            draft.unlink()
        return True

    def _break(self, owner: dict[str, Any]) -> None:
        """Move a dead owner's lock away. Of two processes that try, the rename lets one win."""
        grave = self.path.with_name(f".{self.path.name}.{self._token}.stale")
        try:
            self.path.rename(grave)
        except FileNotFoundError:
            return
        moved = json.loads(grave.read_text())
        if moved["token"] != owner["token"]:  # somebody was quicker and holds it now: give it back
            os.link(grave, self.path)
        grave.unlink()

    def _read(self) -> dict[str, Any] | None:
        try:
            owner: dict[str, Any] = json.loads(self.path.read_text())
        except FileNotFoundError:
            return None
        return owner

    def _heartbeat_age_s(self) -> float:
        try:
            return time.time() - self.path.stat().st_mtime
        except FileNotFoundError:
            return 0.0

    def _beat(self) -> None:
        while not self._released.wait(HEARTBEAT_S):
            try:
                os.utime(self.path)
            except FileNotFoundError:
                return


def _this_process() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
    }


def _is_gone(owner: dict[str, Any], heartbeat_age_s: float) -> bool:
    if owner["host"] == socket.gethostname():
        try:
            process = psutil.Process(owner["pid"])
            # A process id may have been given to another process since; a zombie only waits to be buried.
            reused = abs(process.create_time() - owner["started"]) > 1.0
            return reused or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True
    job = os.environ.get("SLURM_JOB_ID")
    if job and owner["slurm_job"] == job:  # Slurm runs one life of a job at a time
        return True
    return heartbeat_age_s > STALE_AFTER_S
