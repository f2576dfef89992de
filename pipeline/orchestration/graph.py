"""THE stage graph: which stages there are, in which order, what each reads.

This is the only place that knows the order. The local runner and the Slurm submitter both read it.
It imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.config.base import identity
from pipeline.config.pipeline import PipelineConfig


@dataclass(frozen=True)
class Stage:
    """One node of the graph."""

    name: str
    inputs: tuple[str, ...] = ()
    trains: bool = False  # runs on all GPUs of its job, as one process each
    shards: bool = False  # its work can be split into independent array tasks

    @property
    def module(self) -> str:
        """The module to run: `python -m stages.text_tokenizer`."""
        return f"stages.{self.name.replace('-', '_')}"


STAGES: tuple[Stage, ...] = (
    Stage("prepare"),
    Stage("text-tokenizer", inputs=("prepare",)),
    Stage("image-tokenizer", inputs=("prepare",), trains=True),
    Stage("tokenize", inputs=("prepare", "text-tokenizer", "image-tokenizer"), shards=True),
    Stage("transformer", inputs=("text-tokenizer", "image-tokenizer", "tokenize"), trains=True),
    Stage("reranker", inputs=("prepare", "text-tokenizer"), trains=True),
    Stage("generate", inputs=("prepare", "text-tokenizer", "image-tokenizer", "transformer", "reranker"), shards=True),
    Stage("evaluate", inputs=("prepare", "text-tokenizer", "image-tokenizer", "transformer", "generate"), shards=True),
    Stage(
        "report",
        inputs=("prepare", "text-tokenizer", "image-tokenizer", "tokenize", "transformer", "generate", "evaluate"),
    ),
)
STAGE_NAMES: tuple[str, ...] = tuple(stage.name for stage in STAGES)


def stage_named(name: str) -> Stage:
    return STAGES[STAGE_NAMES.index(name)]


def stages_of(config: PipelineConfig) -> tuple[Stage, ...]:
    """The stages of this pipeline, in order: all but those whose section says `enabled: false`."""
    return tuple(stage for stage in STAGES if getattr(config.section(stage.name), "enabled", True))


def inputs_of(config: PipelineConfig, stage: Stage) -> tuple[str, ...]:
    """What `stage` reads in this pipeline."""
    names = {stage.name for stage in stages_of(config)}
    return tuple(name for name in stage.inputs if name in names)


def stage_identity(config: PipelineConfig, stage: str) -> dict[str, Any]:
    """The part of the config that decides this stage's own work (its inputs' identities are apart)."""
    return {"seed": config.seed, stage.replace("-", "_"): identity(config.section(stage))}
