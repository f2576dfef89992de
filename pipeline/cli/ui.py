"""`smalti ui RUN`: MLflow's page for a run, by a server that ends with the command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import click

from pipeline.config.pipeline import load_pipeline
from pipeline.core.errors import UserError
from pipeline.core.loopback import LOOPBACK
from pipeline.orchestration.run_directory import config_of

if TYPE_CHECKING:
    from pipeline.config.pipeline import PipelineConfig
    from pipeline.orchestration.mlflow_store import Store


_FOLLOW_S = 5.0


@click.command()
@click.argument("run_directory", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--port", default=5000, show_default=True, type=click.IntRange(1, 65535))
def ui(run_directory: Path, port: int) -> None:
    """Open MLflow's page for a run. Ctrl-C ends it."""
    from pipeline.core.credentials import put_password_back
    from pipeline.orchestration.mlflow_mirror import catch_up
    from pipeline.orchestration.mlflow_store import Store

    config = load_pipeline(config_of(run_directory))
    store = Store(config)
    if store.uri.startswith(("http:", "https:")):
        raise UserError(
            f"expected a run whose metrics lie in a database, found those of a server: open {store.uri} in a browser"
        )
    if sent := catch_up(config):
        click.echo(f"sent to MLflow, which lacked something of them: {', '.join(sent)}", err=True)
    threading.Thread(target=_follow, args=(config,), name="mlflow", daemon=True).start()
    click.echo(f"open http://{LOOPBACK}:{port}/{_page(store)} in a browser; Ctrl-C ends the server", err=True)
    command = [sys.executable, "-m", "mlflow", "ui", "--host", LOOPBACK, "--port", str(port), "--workers", "1"]
    # By the environment: the command line of a process is everybody's, and the address may hold a password.
    variables = {"MLFLOW_BACKEND_STORE_URI": put_password_back(store.uri)}
    variables["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # else eight more processes, for jobs that nobody sends
    sys.exit(_serve(command, os.environ | variables))


def _follow(config: PipelineConfig) -> None:
    """Keep the database up to date with the stages of Slurm's jobs, which leave it alone."""
    from pipeline.orchestration.mlflow_mirror import Follower

    follower, warned = Follower(config), False
    while True:
        time.sleep(_FOLLOW_S)
        try:
            follower.send()
        except Exception as error:  # MLflow's, SQLAlchemy's, of the file system: the page shows what is there
            if not warned:
                click.echo(f"what jobs write now is not shown ({type(error).__name__}: {error})", err=True)
            warned = True


def _page(store: Store) -> str:
    """Where in MLflow's page the runs of this one's experiment are."""
    try:
        return f"#/experiments/{store.experiment_id(store.connect())}"
    except Exception:  # the page says better what is wrong with the database
        return ""


def _serve(command: list[str], environment: dict[str, str]) -> int:
    """Run the server to its end; a signal ends it with all its processes, which MLflow itself leaves running."""
    servers: list[subprocess.Popen[bytes]] = []
    asked: list[int] = []

    def stop(number: int, _frame: FrameType | None) -> None:
        asked.append(number)
        for server in servers:
            os.killpg(server.pid, signal.SIGTERM)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    server = subprocess.Popen(command, env=environment, start_new_session=True)
    servers.append(server)
    if asked:  # while the server was started
        os.killpg(server.pid, signal.SIGTERM)
    code = server.wait()
    return 0 if code in (-signal.SIGTERM, -signal.SIGINT) else code
