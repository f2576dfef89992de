"""The command line: `smalti …`, also `python -m pipeline …`.

smalti run configs/openmoji.yaml transformer.layers=8     every stage, on this machine
smalti generate runs/openmoji "red heart" -n 16           images from a prompt
smalti reconstruct runs/openmoji FOLDER -o DIR            any images through a run's image tokenizer
smalti export runs/openmoji FOLDER                        its models as one folder, with a model card
smalti evaluate --real FOLDER --fake FOLDER               metrics of any two sets of images
smalti plan configs/dalle-12b.yaml --gpus 1024            memory, FLOPs, time of a training before it starts
smalti <stage> --config configs/openmoji.yaml             one stage
smalti submit configs/openmoji.yaml --cluster FILE        every stage, as Slurm jobs; then status, logs, cancel
smalti doctor configs/openmoji.yaml                       what of this machine would stop it, and what to do
smalti runs                                               runs with state, metrics and size; --disk, --prune; compare
smalti serve runs/openmoji                                a page to generate on, and OpenAI's images API
smalti ui runs/openmoji                                   MLflow's page for a run
smalti data inspect runs/openmoji                         counts, captions and checksums of a run's data; export, push
"""

from __future__ import annotations

import contextlib
import difflib
import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

import click

from pipeline.cli.data import data
from pipeline.cli.doctor import doctor
from pipeline.cli.evaluate import evaluate
from pipeline.cli.export import export
from pipeline.cli.generate import generate
from pipeline.cli.plan import plan
from pipeline.cli.reconstruct import reconstruct
from pipeline.cli.runs import runs
from pipeline.cli.serve import serve
from pipeline.cli.slurm import COMMANDS as SLURM_COMMANDS
from pipeline.cli.stage import AMEND, TAKE_OVER, run_stage_here, stage_arguments
from pipeline.cli.ui import ui
from pipeline.config.base import to_yaml
from pipeline.config.pipeline import PipelineConfig, load_pipeline
from pipeline.core.environment import refuse_what_decides_results
from pipeline.core.errors import StoppedOnRequest, UserError
from pipeline.core.text import one_line
from pipeline.core.version import VERSION
from pipeline.orchestration.graph import STAGE_NAMES, STAGES, stages_of
from pipeline.orchestration.run_record import source_name

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells say it
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE
EXIT_RUN_AGAIN = 75  # EX_TEMPFAIL: nothing is wrong, the same command resumes

_overrides = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")


def main() -> None:
    try:
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # set while Python was importing this
            signal.signal(signal.SIGINT, signal.default_int_handler)
        cli.main(prog_name="smalti", standalone_mode=False)
    except click.ClickException as error:
        if "NoArgs" in type(error).__name__:  # its message is the help
            error.show()
            sys.exit(EXIT_USER_ERROR)
        _fail(error.format_message())
    except UserError as error:
        _fail(str(error))
    except StoppedOnRequest as request:
        click.echo(f"{request}; run the same command again to resume", err=True)
        sys.exit(EXIT_RUN_AGAIN)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:  # of `smalti … | head`
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_BROKEN_PIPE)
    except OSError as error:
        # A place that cannot be read or written is the user's to change; all else is a fault of ours.
        if error.filename is None or error.strerror is None:
            raise
        _fail(f"{error.strerror}: {error.filename}: choose a place that can be read and written")


def _fail(message: str) -> NoReturn:
    """End with one line and the exit code of a user's mistake."""
    click.echo(f"error: {one_line(message)}", err=True)
    sys.exit(EXIT_USER_ERROR)


class Commands(click.Group):
    """Commands, of which a misspelt one gets its neighbours."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], self.commands, n=3, cutoff=0.5) or sorted(self.commands)
            hint = f"did you mean {' or '.join(near)}?" if len(near) <= 3 else f"expected one of {', '.join(near)}"
            raise UserError(f"no command '{args[0]}'; {hint}")
        return super().resolve_command(ctx, args)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(VERSION)
def cli() -> None:
    """Train an image tokenizer and a text+image transformer, and generate images from prompts."""


@cli.command()
@click.argument("config_path", metavar="CONFIG")
@_overrides
@click.option("--from", "first", type=click.Choice(STAGE_NAMES), help="this stage and what comes after it")
@click.option("--only", type=click.Choice(STAGE_NAMES), help="this stage alone")
@click.option("--dry-run", is_flag=True, help="say which stages would run, and why; change nothing")
@click.option("--print-config", is_flag=True, help="print the resolved config and do nothing")
@click.option("--take-over", is_flag=True, help=TAKE_OVER)
@click.option("--amend", is_flag=True, help=AMEND)
@click.option("--hosts", "hostfile", type=click.Path(path_type=Path), help="machines, `NAME slots=PROCESSES` a line")
def run(
    config_path: str,
    overrides: tuple[str, ...],
    first: str | None,
    only: str | None,
    dry_run: bool,
    print_config: bool,
    take_over: bool,
    amend: bool,
    hostfile: Path | None,
) -> None:
    """Run every stage that is not up to date, on this machine; with --hosts trainings run on several.

    CONFIG is a config file or a run directory. With name=… or runs=… a run directory branches off: the new run starts
    with the finished stages that stay the same.
    """
    config = load_pipeline(config_path, overrides)
    if print_config:
        click.echo(to_yaml(config), nl=False)
        return
    from pipeline.orchestration.hosts import read_hosts
    from pipeline.orchestration.local_runner import run_pipeline

    refuse_what_decides_results(os.environ)
    hosts = read_hosts(hostfile) if hostfile else ()
    run_pipeline(
        config, source_name(config_path), take_over, first=first, only=only, dry_run=dry_run, amend=amend, hosts=hosts
    )
    if not dry_run and only in (None, STAGE_NAMES[-1]):
        _say_what_is_worth_a_look(config)
        click.echo(f"done: open {config.run_directory / 'report' / 'index.html'}", err=True)


def _say_what_is_worth_a_look(config: PipelineConfig) -> None:
    from pipeline.orchestration.worth_a_look import worth_a_look

    directories = {stage.name: config.run_directory / stage.name for stage in stages_of(config)}
    if found := worth_a_look(config, directories):
        click.echo("worth a look:\n" + "\n".join(f"  {line}" for line in found), err=True)


def _stage_command(name: str) -> click.Command:
    @click.command(name, help=f"Run the stage {name} alone; its inputs must be finished.")
    @click.option("--config", "config_path", required=True, help="pipeline config, or a run's config.yaml")
    @click.option("--print-config", is_flag=True, help="print the stage's resolved config and do nothing")
    @click.option("--take-over", is_flag=True, help=TAKE_OVER)
    @click.option("--amend", is_flag=True, help=AMEND)
    @_overrides
    def command(config_path: str, overrides: tuple[str, ...], print_config: bool, take_over: bool, amend: bool) -> None:
        if print_config:
            click.echo(to_yaml(load_pipeline(config_path, overrides).section(name)), nl=False)
            return
        run_stage_here(name, stage_arguments(config_path, take_over, overrides, amend))

    return command


cli.add_command(data)
cli.add_command(doctor)
cli.add_command(reconstruct)
cli.add_command(generate)  # with --config it is the stage
cli.add_command(evaluate)  # likewise
cli.add_command(export)
cli.add_command(plan)
cli.add_command(runs)
cli.add_command(serve)
cli.add_command(ui)
for _command in SLURM_COMMANDS:
    cli.add_command(_command)
for _stage in STAGES:
    if _stage.name not in cli.commands:
        cli.add_command(_stage_command(_stage.name))
