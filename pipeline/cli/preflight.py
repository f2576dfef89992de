"""`python -m pipeline.cli.preflight`, which the job files call on every rank (`slurm/preflight.py`)."""

from __future__ import annotations

import os
import time
from pathlib import Path

import click

from pipeline.core import distributed, gpus
from pipeline.slurm import preflight
from pipeline.slurm.preflight import BAD_HOSTS, NO_HOST_TO_BLAME, check_host, meet


@click.command(help=preflight.__doc__)
@click.argument("run_directory", type=click.Path(path_type=Path))
@click.option("--stage", required=True)
@click.option("--hosts", required=True, help="names of the hosts, in the order of ranks")
@click.option("--min-free-gb", default=0.0)
@click.option("--timeout-s", default=120.0, help="for all ranks to meet, and for the all-reduce")
@click.option("--bad-hosts", required=True, type=click.Path(path_type=Path), help="file for the names of bad hosts")
def main(run_directory: Path, stage: str, hosts: str, min_free_gb: float, timeout_s: float, bad_hosts: Path) -> None:
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    gpus.show_own_instance(os.environ)
    started = time.monotonic()
    problem = check_host(run_directory, stage, min_free_gb) if distributed.local_rank() == 0 else None
    names = hosts.split(",")
    here = names[rank * len(names) // processes]
    if processes == 1:
        found = {here: problem} if problem else {}
    else:
        found = meet(rank, processes, names, problem, timeout_s)
    for host, problem in sorted(found.items()):
        click.echo(f"preflight: bad host {host}: {problem}", err=True)
    if found:
        with open(bad_hosts, "a") as file:
            file.writelines(f"{host}\n" for host in sorted(found) if host in names)
        os._exit(BAD_HOSTS if set(found) & set(names) else NO_HOST_TO_BLAME)
    if rank == 0:
        seconds = time.monotonic() - started
        checked = "hosts and all-reduce" if processes > 1 else "host"
        where = f"{processes} processes on {', '.join(names)}"
        click.echo(f"preflight passed: {where} ({checked}, {seconds:.1f} s)", err=True)
    os._exit(0)  # gloo's destructors sometimes abort


if __name__ == "__main__":
    main()
