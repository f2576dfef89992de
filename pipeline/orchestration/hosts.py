"""Several machines without Slurm: `smalti run CONFIG --hosts FILE` starts the ranks of a training on each, by ssh.

    node1 slots=8
    node2 slots=8

The machines share the run directory and have the same Python in the same place; ssh needs no password. Everything that
is one process runs where `smalti run` runs.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pipeline.core.errors import UserError
from pipeline.core.loopback import free_port
from pipeline.orchestration.side_by_side import DEAF_TO_CTRL_C

_LINE = re.compile(r"^(?P<name>[\w.:@-]+)(?:\s+slots=(?P<slots>[1-9]\d*))?$")
# Of this machine's variables the ones that a user sets for all of them.
_PASSED_ON = ("NCCL_", "GLOO_", "TORCH_", "PYTHON", "OMP_", "MLFLOW_", "HF_", "CUDA_DEVICE")


@dataclass(frozen=True)
class Host:
    """A machine, and how many processes of a training run on it."""

    name: str
    slots: int


def read_hosts(path: Path) -> tuple[Host, ...]:
    """The machines of a hostfile as MPI and DeepSpeed know it, in the order of ranks.

    Raises:
        UserError: it cannot be read, or a line is none.
    """
    try:
        lines = [line.partition("#")[0].strip() for line in path.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"expected a hostfile at {path}, found none that can be read ({error})") from error
    hosts = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        found = _LINE.match(line)
        if not found or line.startswith("-"):
            raise UserError(f"{path}, line {number}: expected `NAME slots=PROCESSES`, found '{line}'")
        hosts.append(Host(found["name"], int(found["slots"] or 1)))
    if not hosts:
        raise UserError(f"expected machines in {path}, found none: write `NAME slots=PROCESSES`, one to a line")
    return tuple(hosts)


class RemoteRanks(subprocess.Popen[bytes]):
    """The ranks of one machine, started there by `remote_ranks.py`, to which this is the connection."""

    def __init__(self, host: Host, command: Sequence[str], environments: Sequence[Mapping[str, str]]) -> None:
        agent = [sys.executable, "-m", "pipeline.orchestration.remote_ranks"]
        variables = {name: value for name, value in os.environ.items() if name.startswith(_PASSED_ON)}
        imports = {name: environments[0][name] for name in ("PYTHONPATH", "PYTHONSAFEPATH")}
        there = shlex.join(["env", *(f"{name}={value}" for name, value in imports.items()), *agent])
        # Not its own session: ssh may ask at the terminal whether it knows the machine.
        ssh = ["ssh", host.name, f"cd {shlex.quote(os.getcwd())} && exec {there}"]
        start = agent if host.name == socket.gethostname() else ssh
        super().__init__([*DEAF_TO_CTRL_C, *start], stdin=subprocess.PIPE, env=os.environ | imports)
        assert self.stdin
        task = {"command": list(command), "environments": [variables | dict(ranks) for ranks in environments]}
        self._write(json.dumps(task))

    def send_signal(self, number: int) -> None:
        """SIGTERM to the ranks there, who save; one that ends the connection ends them, too."""
        if number == signal.SIGTERM:
            self._write("stop")
        else:
            super().send_signal(number)

    def _write(self, line: str) -> None:
        assert self.stdin
        with suppress(OSError):  # it has ended
            self.stdin.write(f"{line}\n".encode())
            self.stdin.flush()


def ranks_on(hosts: Sequence[Host]) -> list[list[dict[str, str]]]:
    """What each process of each machine must know of the others, in torchrun's words. Rank 0 is on the first one."""
    processes = sum(host.slots for host in hosts)
    place = {"MASTER_ADDR": hosts[0].name.rpartition("@")[2], "MASTER_PORT": str(free_port())}
    found, first = [], 0
    for host in hosts:
        here = place | {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(host.slots)}
        found.append([here | {"RANK": str(first + local), "LOCAL_RANK": str(local)} for local in range(host.slots)])
        first += host.slots
    return found
