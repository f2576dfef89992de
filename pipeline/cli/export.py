"""`smalti export RUN DIR`: the models of a run as one folder; with `--step N`, one of them from a checkpoint."""

from __future__ import annotations

from pathlib import Path

import click

from pipeline.core.errors import UserError
from pipeline.orchestration.graph import STAGES

_TRAINED = [stage.name for stage in STAGES if stage.trains]


@click.command("export")
@click.argument("run_directory", metavar="RUN", type=click.Path(path_type=Path))
@click.argument("target", metavar="[DIR]", required=False, type=click.Path(path_type=Path))
@click.option("--step", type=click.IntRange(min=1), help="of a stage in training or finished: its checkpoint to export")
@click.option("--stage", type=click.Choice(_TRAINED), default="transformer", show_default=True, help="with --step")
@click.option(
    "--averaged/--no-averaged", default=None, help="with --step: averaged weights or not; default: if there are any"
)
@click.option(
    "--shard-gb",
    type=click.FloatRange(min=0, min_open=True),
    help="with --step: larger weights are in several files; default: 5",
)
def export(
    run_directory: Path,
    target: Path | None,
    step: int | None,
    stage: str,
    averaged: bool | None,
    shard_gb: float | None,
) -> None:
    """Export a finished run to one self-contained folder with a model card.

    With --step, only the weights and config of one model, from a checkpoint, to DIR or RUN/STAGE/exported/step-N.
    """
    # Imported here: these bring torch, which most commands do without.
    from pipeline.core.weights import SHARD_BYTES
    from pipeline.sampling.export import export_run
    from pipeline.training.consolidate import export_step

    if step is not None:
        shard_bytes = int(shard_gb * 1e9) if shard_gb else SHARD_BYTES
        target, averaged = export_step(run_directory, stage, step, target, averaged, shard_bytes)
        click.echo(f"exported to {target}: {'averaged' if averaged else 'not averaged'} weights", err=True)
        return
    if averaged is not None or shard_gb is not None:
        raise UserError("--averaged, --no-averaged and --shard-gb need a checkpoint: add --step N")
    if target is None:
        raise UserError("expected a folder to export to: smalti export RUN DIR")
    export_run(run_directory, target)
    click.echo(f'exported to {target}; try: smalti generate {target} "red heart" -o image.png', err=True)
