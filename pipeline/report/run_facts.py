"""Facts of a run for the report, read from its stage directories. A missing detail is left out, never made up."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

from pipeline.core.atomic_io import read_json
from pipeline.core.weights import count_parameters
from pipeline.data.shards import caption_count
from pipeline.orchestration.going_on import Amendment
from pipeline.orchestration.graph import STAGES
from pipeline.orchestration.tracking import read_history

_PACKAGES = (
    "torch",
    "deepspeed",
    "accelerate",
    "transformers",
    "tokenizers",
    "webdataset",
    "mlflow",
    "numpy",
    "pillow",
)


@dataclass(frozen=True)
class StageFacts:
    """What is known of one stage. `history` is metrics.jsonl, a dict per step."""

    name: str
    wall_time_s: float | None
    parameters: int | None
    output_bytes: int
    history: list[dict[str, float]] = field(repr=False)
    amendments: list[Amendment] = field(default_factory=list)  # what changed in the middle of its training

    @property
    def steps(self) -> int | None:
        """Steps that were trained."""
        return int(self.history[-1]["step"]) if self.history else None

    @property
    def best(self) -> tuple[str, float, int] | None:
        """With `training.keep_best`: the metric, its best value, and the step whose weights are the model."""
        last = next((line for line in reversed(self.history) if "best/step" in line), None)
        if last is None:
            return None
        name = next(key for key in last if key.startswith("best/") and key != "best/step")
        return name.removeprefix("best/"), last[name], int(last["best/step"])

    @property
    def samples_per_s(self) -> float | None:
        """Median over the stage's logs."""
        found = [line["samples_per_s"] for line in self.history if "samples_per_s" in line]
        return median(found) if found else None


@dataclass(frozen=True)
class RunFacts:
    """What is known of the whole run; stages in the order that data flowed."""

    stages: dict[str, StageFacts]
    code: dict[str, Any]  # version, commit, changed
    finished: str | None
    index: dict[str, Any]  # prepare/index.json
    versions: dict[str, str]

    @property
    def wall_time_s(self) -> float:
        """The wall time of all stages together."""
        return sum(stage.wall_time_s or 0.0 for stage in self.stages.values())

    @property
    def captions(self) -> int:
        """Captions of the training images: more than images where `prepare.caption` is random."""
        return caption_count(self.index["splits"]["train"])

    @property
    def trained(self) -> list[StageFacts]:
        """The stages of this run that train a model, as the graph has it."""
        return [self.stages[stage.name] for stage in STAGES if stage.trains and stage.name in self.stages]


def read_facts(directories: Mapping[str, Path]) -> RunFacts:
    """Facts of the stages in `directories`, by stage name, in the order that data flowed."""
    stages = {name: _stage(name, directory) for name, directory in directories.items()}
    times = [line["time"] for stage in stages.values() for line in stage.history if "time" in line]
    manifests = [_json(directory / "manifest.json") for directory in directories.values()]
    code: dict[str, Any] = next((manifest["code"] for manifest in reversed(manifests) if manifest.get("code")), {})
    finished = datetime.fromtimestamp(max(times), UTC).strftime("%-d %B %Y, %H:%M UTC") if times else None
    return RunFacts(stages, code, finished, _json(directories["prepare"] / "index.json"), _versions())


def _stage(name: str, directory: Path) -> StageFacts:
    timing = _json(directory / "timing.json") or _json(directory / "manifest.json")
    manifest = _json(directory / "manifest.json")
    outputs = manifest.get("outputs", {})
    return StageFacts(
        name=name,
        wall_time_s=timing.get("wall_time_s"),
        parameters=count_parameters(directory / "model"),
        output_bytes=sum(output["bytes"] for output in outputs.values()),
        history=read_history(directory),
        amendments=manifest.get("amendments", []),
    )


def _json(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = read_json(path) if path.is_file() else {}
    return value


def _versions() -> dict[str, str]:
    found = {"Python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
