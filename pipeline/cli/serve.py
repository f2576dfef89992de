"""`smalti serve RUN`: a page to generate on, and OpenAI's images API."""

from __future__ import annotations

from pathlib import Path

import click

_file = click.Path(path_type=Path)


@click.command("serve")
@click.argument("directory", metavar="RUN_OR_EXPORT", type=_file)
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="other than loopback only with one of the next two"
)
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0: a free one")
@click.option("--token-file", type=_file, help="its content is the API key that clients must send")
@click.option("--no-auth", is_flag=True, help="everybody who can connect may generate")
@click.option("--name", help="of the model; default: the directory's")
@click.option(
    "--slots",
    default=16,
    show_default=True,
    type=click.IntRange(1, 4096),
    help="images drawn at once; guided ones count 2",
)
@click.option("--waiting", default=32, show_default=True, type=click.IntRange(0, 10_000), help="requests in the queue")
@click.option(
    "--timeout", "timeout_s", default=300.0, show_default=True, type=click.FloatRange(min=1), help="seconds a request"
)
@click.option(
    "--body-limit", default=2**23, show_default=True, type=click.IntRange(min=1024), help="bytes a request, uploads too"
)
@click.option(
    "--step",
    type=click.IntRange(min=1),
    help="of a run in training: this checkpoint; default: the newest, if unfinished",
)
def serve(
    directory: Path,
    host: str,
    port: int,
    token_file: Path | None,
    no_auth: bool,
    name: str | None,
    slots: int,
    waiting: int,
    timeout_s: float,
    body_limit: int,
    step: int | None,
) -> None:
    """Serve a run, or a folder that `smalti export` wrote, until Ctrl-C or SIGTERM.

    Of a run that is in training, the newest export or complete checkpoint of its transformer.

    A page at /, OpenAI's images API below /v1, /health, /ready, /metrics.
    """
    from pipeline.sampling.model_source import find_models, newest_step
    from pipeline.serving.server import Serving
    from pipeline.serving.server import serve as serve_until_asked

    step = step or newest_step(directory)
    find_models(directory, step)  # what is wrong with it is told before the models load
    serving = Serving(host, port, token_file, no_auth, name, slots, waiting, timeout_s, body_limit)
    serve_until_asked(directory, serving, step)
