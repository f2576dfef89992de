"""The process of one stage: arguments, logging, signals, exit codes.

    python -m stages.prepare --config configs/openmoji.yaml prepare.image_size=64

The contract of a stage process:
    exit 0 with `_SUCCESS`       finished, now or before
    exit 0 without `_SUCCESS`    stopped on request; rerun it, it resumes
    exit 2                       a user's mistake; stderr says in one line what to do
    anything else                a crash; the traceback is on stderr
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import click
from click.core import ParameterSource

from pipeline.config.pipeline import PipelineConfig, is_run_config, load_pipeline
from pipeline.core import gpus, signals
from pipeline.core.environment import refuse_what_decides_results
from pipeline.core.errors import StoppedOnRequest, UserError
from pipeline.core.process_limits import raise_open_files
from pipeline.core.progress import ON_SCREEN
from pipeline.core.text import one_line
from pipeline.core.urls import MaskingFormatter
from pipeline.core.watchdog import rank_log
from pipeline.data import remote_file
from pipeline.orchestration.environment import RUNNER_VARIABLE
from pipeline.orchestration.graph import ARRAY_STAGES, Stage, stage_named
from pipeline.orchestration.run_directory import writing_in
from pipeline.orchestration.run_record import source_name
from pipeline.orchestration.stage_run import StageRun, execute

log = logging.getLogger(__name__)

TAKE_OVER = "use a run directory that was made from a config file of another name"
_WITH_CONFIG = ("config_path", "take_over", "print_config")
AMEND = "go on with another learning rate or the like in the middle of a training, from its checkpoint"


def run_stage(name: str, body: Callable[[StageRun], None]) -> None:
    """Entry point of `python -m stages.<name>`. Never returns."""
    from pipeline.core import distributed
    from pipeline.core.arithmetic import prepare_determinism

    signals.install()
    raise_open_files()
    _die_with_runner()
    stage = stage_named(name)
    try:
        distributed.forget_leftovers(os.environ, joins=stage.trains)
        gpus.show_own_instance(os.environ)
        refuse_what_decides_results(os.environ)
        config, source, array_task, flags = _arguments(stage)
        _configure_logging(config.run_directory / "logs" / f"{name}.log")
        remote_file.configure(config.store)
        if stage.trains:
            training = config.training(stage.section)
            if training is not None and training.deterministic:
                prepare_determinism()
            distributed.init()
        execute(stage, config, source, array_task, body, **flags)
        status = 0
    except StoppedOnRequest as request:
        log.info("%s; run the same command again to resume", request)
        status = 0
    except UserError as error:
        if distributed.tells(str(error)):
            log.error("error%s: %s", f" (rank {distributed.rank()})" if distributed.rank() else "", one_line(error))
        status = 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            log.exception("%s crashed", name)
            status = 1
        else:
            log.error("error: no space left (%s): free some and rerun; it resumes", error)
            status = 2
    except SystemExit as leaving:  # --help
        status = int(leaving.code or 0)
    except BaseException as error:
        if distributed.lost_another(error):
            told = f"{type(error).__name__}: {one_line(error)}"
            log.error("%s ends on rank %d, which has lost another: %s", name, distributed.rank(), told)
        else:
            log.exception("%s crashed", name)
        status = 1
    signals.ignore()
    distributed.leave(status)


def _arguments(stage: Stage) -> tuple[PipelineConfig, str, tuple[int, int] | None, dict[str, bool]]:
    """The resolved config, the name of the config file it came from, the array task, and what `execute` may do."""
    parsed: dict[str, tuple[str, str | None, dict[str, bool], tuple[str, ...]]] = {}

    @click.command(help=f"Run the stage {stage.name} of a pipeline.")
    @click.option("--config", "path", required=True, help="pipeline config (YAML), or a run's config.yaml")
    @click.option("--array-task", metavar="I/N", help="do the share of task I (from 0) of N; then run the stage itself")
    @click.option("--take-over", is_flag=True, help=TAKE_OVER)
    @click.option("--amend", is_flag=True, help=AMEND)
    @click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
    def command(path: str, array_task: str | None, overrides: tuple[str, ...], **flags: bool) -> None:
        parsed["it"] = (path, array_task, flags, overrides)

    try:
        if command.main(prog_name=f"python -m {stage.module}", standalone_mode=False) == 0 and not parsed:
            sys.exit(0)  # --help
    except click.ClickException as error:
        raise UserError(error.format_message()) from error
    path, array_task, flags, overrides = parsed["it"]
    return load_pipeline(path, overrides), source_name(path), _parsed_task(stage, array_task), flags


def _parsed_task(stage: Stage, text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    which, _, of = text.partition("/")
    if not stage.shards or not (which.isdigit() and of.isdigit() and int(which) < int(of)):
        raise UserError(
            f"--array-task {text}: expected I/N with 0 <= I < N, of a stage that splits"
            f" ({', '.join(ARRAY_STAGES)}), found it for {stage.name}"
        )
    return int(which), int(of)


def run_stage_here(name: str, arguments: list[str]) -> NoReturn:
    """`python -m stages.<name> …` in this process. Ends it."""
    sys.argv = [name, *arguments]
    runpy.run_module(stage_named(name).module, run_name="__main__", alter_sys=True)
    raise AssertionError("a stage ends its process")


def stage_arguments(config_path: str, take_over: bool, overrides: tuple[str, ...], amend: bool = False) -> list[str]:
    """What a command passes on to the stage that it starts."""
    flags = [name for name, given in (("--take-over", take_over), ("--amend", amend)) if given]
    return ["--config", config_path, *flags, *overrides]


def refuse_other_options(section: str) -> None:
    """Of a command that with --config is a stage: what its other options ask for stands in the config then.

    Raises:
        UserError: one was given.
    """
    context = click.get_current_context()
    for parameter in context.command.params:
        given = context.get_parameter_source(parameter.name or "") is ParameterSource.COMMANDLINE
        if given and isinstance(parameter, click.Option) and parameter.name not in _WITH_CONFIG:
            raise UserError(
                f"{parameter.opts[-1]}: expected none beside --config, which runs the stage {section}, found one: set"
                f" the key of the config instead ({section}.…=…, see docs/config.md), or leave --config out"
            )


def _configure_logging(path: Path) -> None:
    """What the screen shows stays in logs/<stage>.log: rank 0's messages and progress, other ranks' errors.

    All that another rank says is in logs/<stage>/rank-N.log.
    """
    rank = int(os.environ.get("RANK", "0"))
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    handlers[0].addFilter(lambda record: not hasattr(record, ON_SCREEN))
    if is_run_config(path.parent.parent / "config.yaml"):  # and in no folder of something else
        with writing_in(path.parent.parent):
            path.parent.mkdir(exist_ok=True)
            handlers.append(logging.FileHandler(path))
            if rank:
                own = rank_log(path.parent, path.stem, rank)
                own.parent.mkdir(exist_ok=True)
                handlers.append(logging.FileHandler(own))
    handlers[0].setFormatter(MaskingFormatter("%(message)s"))
    for handler in handlers[1:]:
        handler.setFormatter(MaskingFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    for shared in handlers[:2] if rank else ():
        shared.setLevel(logging.ERROR)
    logging.basicConfig(level=logging.INFO, handlers=handlers)
    logging.captureWarnings(True)
    for noisy in ("DeepSpeed", "deepspeed", "accelerate", "torch.distributed", "compilers"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _die_with_runner() -> None:
    """A stage started by the local runner ends when the runner is killed, so that a new one can take over at once."""
    runner = os.environ.get(RUNNER_VARIABLE)
    if runner and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if not os.path.exists(f"/proc/{runner}"):
            os._exit(1)
