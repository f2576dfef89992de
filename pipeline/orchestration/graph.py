"""THE stage graph: which stages there are, in which order, what each reads.

This is the only place that knows the order: the local runner, the Slurm submitter, the command line, the report and the
tests derive what they need from it. To add a stage `my-stage`: a line in `_WORK` below, its name in the `inputs` of
what reads it, its config section `PipelineConfig.my_stage`, its code `stages/my_stage.py` (CONTRIBUTING.md).
Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pipeline.config.base import identity
from pipeline.config.pipeline import PipelineConfig
from pipeline.config.prepare import NO_LONGER_DECIDES
from pipeline.config.renamed import with_current_names
from pipeline.config.reranker import refuse_single_samples
from pipeline.config.training import Precision, accumulation_steps
from pipeline.config.tune import refuse_split_groups
from pipeline.core.errors import UserError


@dataclass(frozen=True)
class Stage:
    """A node of the graph."""

    name: str
    inputs: tuple[str, ...] = ()
    looks_at: tuple[str, ...] = ()  # read for checks alone: no part of what the result is a function of
    trains: bool = False  # runs as one process per GPU of its job; its section has a `training`
    shards: bool = False  # its work can be split into independent array tasks
    workers: bool = False  # one process of it fills a machine's cores by itself: array tasks are for several machines

    @property
    def section(self) -> str:
        """The name of its config section: `text_tokenizer`."""
        return self.name.replace("-", "_")

    @property
    def module(self) -> str:
        """The module to run: `python -m stages.text_tokenizer`."""
        return f"stages.{self.section}"


_WORK = (
    Stage("prepare", shards=True, workers=True),
    Stage("text-tokenizer", inputs=("prepare",)),
    Stage("image-tokenizer", inputs=("prepare",), trains=True),
    Stage("tokenize", inputs=("prepare", "text-tokenizer", "image-tokenizer"), shards=True),
    Stage("transformer", ("text-tokenizer", "image-tokenizer", "tokenize"), looks_at=("prepare",), trains=True),
    Stage("reranker", inputs=("prepare", "text-tokenizer"), trains=True),
    Stage("tune", ("prepare", "text-tokenizer", "image-tokenizer", "transformer", "reranker"), trains=True),
    Stage("generate", ("prepare", "text-tokenizer", "image-tokenizer", "transformer", "reranker", "tune"), shards=True),
    Stage("evaluate", ("prepare", "text-tokenizer", "image-tokenizer", "transformer", "tune", "generate"), shards=True),
)
STAGES: tuple[Stage, ...] = (*_WORK, Stage("report", inputs=tuple(stage.name for stage in _WORK)))
STAGE_NAMES: tuple[str, ...] = tuple(stage.name for stage in STAGES)
SHARES = "source_shares"  # in a training's identity: how many of each 1,000 samples come from each of prepare.sources
ARRAY_STAGES: tuple[str, ...] = tuple(stage.name for stage in STAGES if stage.shards)


def stage_named(name: str) -> Stage:
    """The stage of this name. Raises ValueError if there is none."""
    return STAGES[STAGE_NAMES.index(name)]


def stages_of(config: PipelineConfig) -> tuple[Stage, ...]:
    """The stages of this pipeline, in order: all but those whose section says `enabled: false`."""
    return tuple(stage for stage in STAGES if config.is_enabled(stage.section))


def inputs_of(config: PipelineConfig, stage: Stage) -> tuple[str, ...]:
    """The names of the stages that `stage` reads in this pipeline."""
    names = {stage.name for stage in stages_of(config)}
    return tuple(name for name in stage.inputs if name in names)


def chosen_stages(config: PipelineConfig, first: str | None = None, only: str | None = None) -> tuple[Stage, ...]:
    """The stages that a command asks for: all; `first` and those after it; or `only` one.

    Raises:
        UserError: both are given, or the stage is not part of this pipeline.
    """
    if first and only:
        raise UserError(
            "expected --from or --only, found both: --from STAGE goes to the end, --only STAGE is one stage"
        )
    stages = stages_of(config)
    if only and stage_named(only) not in stages:
        raise UserError(f"{only} is not part of this pipeline: set {stage_named(only).section}.enabled=true")
    if only:
        return (stage_named(only),)
    return tuple(stage for stage in stages if not first or STAGES.index(stage) >= STAGE_NAMES.index(first))


def check_before_start(config: PipelineConfig, processes_of: Callable[[Stage], int], where: str = "") -> None:
    """Check what a pipeline of all stages needs and its config alone decides: better now than hours later.

    Raises:
        UserError: a stage's processes do not divide its batch (`where`: what decides their number), leave a reranker
            single samples or split tune's groups, there is no validation split, which every training measures itself
            on, or guidance that no training prepares.
    """
    if config.prepare.validation_fraction == 0:
        raise UserError(
            "prepare.validation_fraction: expected more than 0, since the stages that train evaluate on the validation"
            " split, found 0: set it to 0.02, say"
        )
    _check_guidance(config)
    if config.reranker.enabled and config.reranker.clip is None:
        refuse_single_samples(config.reranker.training, processes_of(stage_named("reranker")))
    if config.tune.enabled:
        refuse_split_groups(config.tune, processes_of(stage_named("tune")))
    for stage in stages_of(config):
        training = config.training(stage.section)
        if training is not None:
            _check_precision(config, stage, training.precision)
            try:
                accumulation_steps(training, processes_of(stage))
            except UserError as error:
                raise UserError(f"{stage.name}: {error}{where}") from error


def _check_precision(config: PipelineConfig, stage: Stage, precision: Precision) -> None:
    deepspeed = getattr(config.section(stage.section), "deepspeed", None)
    try:
        if deepspeed is not None:
            deepspeed.check_precision(precision)
        elif precision == "bf16-weights":
            raise UserError(
                "expected training.precision bf16, bf16-autocast, fp32 or fp16, since it trains through accelerate,"
                " found bf16-weights, which is the transformer's: set bf16"
            )
    except UserError as error:
        raise UserError(f"{stage.name}: {error}") from error


def _check_guidance(config: PipelineConfig) -> None:
    if config.transformer.caption_dropout > 0:
        return
    scales = {"generate.sampling.guidance": [config.generate.sampling.guidance]}
    if config.evaluate.sweep is not None:
        scales["evaluate.sweep.guidance"] = config.evaluate.sweep.guidance
    for key, values in scales.items():
        if other := [scale for scale in values if scale != 1]:
            raise UserError(
                f"{key}: expected 1 without transformer.caption_dropout, found {other[0]:g}: set"
                " transformer.caption_dropout=0.1, say, or leave guidance at 1"
            )


def stage_identity(config: PipelineConfig, stage: str) -> dict[str, object]:
    """The part of the config that decides this stage's own work (its inputs' identities are apart)."""
    section = stage_named(stage).section
    own: dict[str, object] = {"seed": config.seed, section: identity(config.section(section))}
    if stage_named(stage).trains and config.prepare.source_shares:
        own[SHARES] = list(config.prepare.source_shares)
    if stage == "prepare":
        own[section] = identity(config.prepare) | NO_LONGER_DECIDES
    if stage == "text-tokenizer" and config.transformer.condition == "class":
        own["condition"] = "class"
    return own


def as_of_today(recorded: dict[str, object]) -> dict[str, object]:
    """A `stage_identity` that an earlier version recorded, as this one would have."""
    current: dict[str, object] = with_current_names(recorded)
    if isinstance(section := current.get("prepare"), dict):
        current["prepare"] = section | NO_LONGER_DECIDES
    return current
