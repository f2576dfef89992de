"""`python -m pipeline.cli.preflight`, which the supervisor calls on every rank (`slurm/preflight.py`)."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import click

from pipeline.core import gpus
from pipeline.core.process_limits import raise_open_files
from pipeline.slurm import preflight
from pipeline.slurm.preflight import BAD_HOSTS, Verdict, check_host, follow, lead, too_few_files
from pipeline.slurm.roll_call import Announced, RollCall


@click.command(help=preflight.__doc__)
@click.argument("run_directory", type=click.Path(path_type=Path))
@click.option("--stage", required=True)
@click.option("--hosts", required=True, help="names of the hosts of the job")
@click.option("--min-free-gb", default=0.0)
@click.option("--timeout-s", default=120.0, help="for all ranks to come, from the first on, and for the all-reduce")
@click.option("--bad-hosts", required=True, type=click.Path(path_type=Path), help="file for the names of bad hosts")
def main(run_directory: Path, stage: str, hosts: str, min_free_gb: float, timeout_s: float, bad_hosts: Path) -> None:
    raise_open_files()
    gpus.show_own_instance(os.environ)
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    here, names = os.environ.get("SLURMD_NODENAME") or socket.gethostname(), hosts.split(",")
    started = time.monotonic()
    if rank:
        # Rank 0 may start last, and has as much patience with the others.
        announced = Announced(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), rank, here, 2 * timeout_s)
        problem, gpu = _looked_at(run_directory, stage, min_free_gb)
        follow(announced, rank, processes, problem, timeout_s, gpu)
        os._exit(0)  # gloo's destructors sometimes abort
    if mistake := too_few_files(processes):
        verdict = Verdict(mistake=mistake)
    elif processes > 1:
        call = RollCall(int(os.environ["MASTER_PORT"]), processes)
        call.note(0, host=here)
        problem, gpu = _looked_at(run_directory, stage, min_free_gb)
        verdict = lead(call, processes, names, problem, timeout_s, gpu)
    else:
        problem, _ = _looked_at(run_directory, stage, min_free_gb)
        verdict = Verdict({here: problem} if problem else {})
    _tell(verdict, bad_hosts, names)
    if not verdict.exit_code:
        checked = "hosts and all-reduce" if processes > 1 else "host"
        where = f"{processes} processes on {', '.join(names)}"
        click.echo(f"preflight passed: {where} ({checked}, {time.monotonic() - started:.1f} s)", err=True)
    os._exit(verdict.exit_code)


def _looked_at(run_directory: Path, stage: str, min_free_gb: float) -> tuple[str | None, str]:
    """What is wrong with this host (one process of each looks) or this rank's GPU; and which GPU. Imports torch."""
    problem = check_host(run_directory, stage, min_free_gb) if os.environ.get("LOCAL_RANK", "0") == "0" else None
    from pipeline.slurm.device_check import device_identity, device_problem

    problem = problem or device_problem()
    return problem, "" if problem else device_identity()


def _tell(verdict: Verdict, bad_hosts: Path, names: list[str]) -> None:
    for host, problem in sorted(verdict.bad.items()):
        click.echo(f"preflight: bad host {host}: {problem}", err=True)
    for line in filter(None, [verdict.late, verdict.nobody, *verdict.notes, verdict.mistake]):
        click.echo(f"preflight: {line}", err=True)
    if verdict.exit_code == BAD_HOSTS:
        with open(bad_hosts, "a") as file:
            file.writelines(f"{host}\n" for host in sorted(verdict.bad) if host in names)


if __name__ == "__main__":
    main()
