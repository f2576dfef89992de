"""`smalti export RUN DIR`: the models of a run as one folder that needs nothing else (`sampling/export.py`)."""

from __future__ import annotations

from pathlib import Path

import click

from pipeline.sampling.export import export_run


@click.command("export")
@click.argument("run_directory", metavar="RUN", type=click.Path(path_type=Path))
@click.argument("target", metavar="DIR", type=click.Path(path_type=Path))
def export(run_directory: Path, target: Path) -> None:
    """Export a finished run to one self-contained folder with a model card."""
    export_run(run_directory, target)
    click.echo(f'exported to {target}; try: smalti generate {target} "red heart" -o image.png', err=True)
