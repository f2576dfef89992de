"""`smalti serve`: loads the models, listens, and ends as it was asked to.

SIGTERM or Ctrl-C: what runs is finished, what waits or comes is refused, and the process ends with 0. A second one ends
it at once. If it cannot draw any more, all are refused, and it ends with 1.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import click
import uvicorn

from pipeline.core.distributed import device
from pipeline.core.errors import UserError
from pipeline.sampling.pipeline import Pipeline
from pipeline.serving.app import Served, build_app
from pipeline.serving.counts import Counts
from pipeline.serving.engine import Engine
from pipeline.serving.guard import LOCAL_NAMES, Guard
from pipeline.serving.nearest import NearestImages

_SHORTEST_TOKEN = 16  # characters
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_CONNECTIONS = 512
_EXIT_FAILED = 1  # other than a user's mistake; systemd starts it again


@dataclass(frozen=True)
class Serving:
    """How to serve."""

    host: str = "127.0.0.1"
    port: int = 8000
    token_file: Path | None = None
    no_auth: bool = False
    name: str | None = None
    slots: int = 16
    waiting: int = 32
    timeout_s: float = 300.0
    body_limit: int = 2**23


def serve(directory: Path, serving: Serving, step: int | None = None) -> None:
    """Until a signal comes; `step`: with the transformer of a run as it was after so many steps of its training.

    Raises:
        UserError: models that are not there, an address that is not free, a place for everybody without a token.
    """
    token = _token(serving)
    counts = Counts()
    pipeline = Pipeline.from_pretrained(directory, device(), step=step)
    if pipeline.transformer.grouped:
        raise UserError(
            f"{directory}: expected a transformer without code_groups, which cannot be served: use generate"
        )
    engine = Engine(pipeline, serving.slots, serving.waiting, serving.timeout_s, counts)
    name = serving.name or directory.absolute().name
    nearest = NearestImages.of_run(directory, device())
    app = build_app(Served(name, pipeline, engine, counts, serving.timeout_s, int(time.time()), nearest))
    only_local = serving.host in LOCAL_NAMES
    guard = Guard(app, counts.answered, token, only_local, serving.body_limit)
    config = uvicorn.Config(
        guard,
        host=serving.host,
        port=serving.port,
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=_CONNECTIONS,
        timeout_graceful_shutdown=int(serving.timeout_s) + 5,
    )
    server = _Server(config, engine)
    try:
        with contextlib.closing(config.bind_socket()) as socket:
            socket.listen(config.backlog)  # so that nobody who reads the next line is refused
            if step is not None:
                click.echo(f"{name}: in training; the transformer after {step:,} steps is served", err=True)
            click.echo(f"{name}: open http://{_shown(serving.host)}:{socket.getsockname()[1]}/ in a browser", err=True)
            engine.start()
            server.run([socket])
    except SystemExit as error:  # uvicorn's, after it has logged that the address is taken
        raise UserError(
            f"expected to listen at {serving.host}:{serving.port}, found it taken or not of this machine:"
            " choose another --port or --host"
        ) from error
    engine.stop()
    engine.join(serving.timeout_s)
    if engine.failed:
        click.echo(f"{name}: drawing cannot go on, the log says why; start it again", err=True)
        sys.exit(_EXIT_FAILED)


class _Server(uvicorn.Server):
    """uvicorn's, which would end with the signal that it was sent."""

    def __init__(self, config: uvicorn.Config, engine: Engine) -> None:
        super().__init__(config)
        self._engine = engine

    async def on_tick(self, counter: int) -> bool:
        """Whether to end, which is asked ten times a second."""
        return await super().on_tick(counter) or self._engine.failed

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._asked_to_stop) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _asked_to_stop(self, _number: int, _frame: FrameType | None) -> None:
        if self.should_exit:
            self.force_exit = True
            return
        self.should_exit = True
        threading.Thread(target=self._engine.stop, daemon=True).start()  # it takes a lock that may be held here


def _token(serving: Serving) -> str | None:
    """What clients must know. Raises UserError."""
    if serving.token_file is not None:
        try:
            token = serving.token_file.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--token-file: expected a text file at {serving.token_file}, found: {error}") from error
        if len(token) < _SHORTEST_TOKEN or not token.isascii():
            raise UserError(
                f"--token-file: expected at least {_SHORTEST_TOKEN} ASCII characters in {serving.token_file}, found"
                f" {len(token)}: make one with `openssl rand -hex 32`"
            )
        return token
    if serving.host not in LOCAL_NAMES and not serving.no_auth:
        raise UserError(
            f"--host {serving.host}: expected a token where other machines can connect, found none: add --token-file"
            " FILE, or --no-auth if everybody there may generate"
        )
    return None


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host
