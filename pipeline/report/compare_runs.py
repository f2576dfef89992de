"""Two runs side by side: their metrics, and a page with the images that they generated of the same prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from pipeline.config.pipeline import PipelineConfig
from pipeline.core.atomic_io import read_json
from pipeline.core.text import visible
from pipeline.evaluation.results import FILE, read_results, rows_in
from pipeline.evaluation.rows import Better, Row
from pipeline.orchestration.graph import STAGE_NAMES, stages_of
from pipeline.orchestration.run_directory import RunDirectory
from pipeline.report.numbers import metric
from pipeline.report.shown_images import data_uri

Key = tuple[str, str, int, int, str | None, str]  # metric, compares, n_generated, n_real, weights, protocol


@dataclass(frozen=True)
class Compared:
    """A metric of two runs; None where one has not measured it."""

    name: str
    better: Better
    first: float | None
    second: float | None

    @property
    def winner(self) -> int | None:
        """0 or 1; None if they are equal, or one is missing."""
        if self.first is None or self.second is None or self.first == self.second:
            return None
        return int((self.second < self.first) == (self.better == "lower"))

    def cells(self) -> list[str]:
        marks = ["*" if self.winner == side else "" for side in (0, 1)]
        return [self.name, metric(self.first) + marks[0], metric(self.second) + marks[1]]


@dataclass(frozen=True)
class PromptPair:
    """What two runs made of one prompt, as URIs; None where a run has no such image."""

    prompt: str
    first: str | None
    second: str | None


@dataclass(frozen=True)
class Side:
    """What is compared of a run; `left_out`: a line on each of its stages whose results its config would not make."""

    name: str
    rows: dict[Key, Row]
    images: dict[str, Path]  # of each prompt
    left_out: list[str]


def side_of(run: Path, config: PipelineConfig) -> Side:
    """The metrics and images of a run that are of its config of today."""
    files = {"evaluate": run / "evaluate" / FILE, "generate": run / "generate" / "prompts.json"}
    there = [name for name, file in files.items() if file.is_file()]
    outdated = {name: reasons for name in there if (reasons := _outdated(run, config, name))}
    left_out = [
        f"{run}: what {name} left is of another config or unfinished, so it is not compared"
        f" ({'; '.join(reasons[:4])}): run `smalti run {run}` to its end first"
        for name, reasons in outdated.items()
    ]
    fit = set(there) - set(outdated)
    rows = rows_in(read_results(run / "evaluate")) if "evaluate" in fit else []
    entries = read_json(files["generate"]) if "generate" in fit else []
    images = {entry["prompt"]: run / "generate" / entry["file"] for entry in entries}
    return Side(run.name, {_key(row): row for row in rows}, images, left_out)


def compared_metrics(first: Side, second: Side) -> list[Compared]:
    """The metrics that both measured on the same kind and number of images in the same features, then those that one
    has."""
    left, right = first.rows, second.rows
    names = Counter(key[:2] for key in {**left, **right})  # in the order of their first
    order = list(names)
    keys = sorted({**left, **right}, key=lambda key: (key not in left or key not in right, order.index(key[:2])))
    return [_compared(left.get(key), right.get(key), names[key[:2]] > 1) for key in keys]


def comparison_page(first: Side, second: Side, keys: Sequence[str], rows: Sequence[Compared]) -> str:
    """One HTML file that holds its images."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("compare_runs.html").render(
        names=(first.name, second.name), keys=keys, rows=rows, prompts=_prompts(first, second), metric=metric,
        left_out=first.left_out + second.left_out,
    )  # fmt: skip


def _outdated(run: Path, config: PipelineConfig, name: str) -> list[str]:
    """Why the config of a run would not make what its stage `name` left; stages that are not here are not asked."""
    runs, reasons = RunDirectory(run.resolve()), []
    stages = [stage for stage in stages_of(config) if STAGE_NAMES.index(stage.name) <= STAGE_NAMES.index(name)]
    gone = {f"input {stage.name} changed" for stage in stages if not runs.stage(stage.name).exists()}
    for stage in stages:
        if runs.stage(stage.name).exists():
            found = runs.stale_reasons(config, stage, files=False)
            reasons += [f"{stage.name}: {reason}" for reason in found if reason not in gone]
    return reasons


def _key(row: Row) -> Key:
    """What two rows have in common that may be compared."""
    return row.metric, row.compares, row.n_generated, row.n_real, row.weights_sha256, row.protocol


def _compared(first: Row | None, second: Row | None, with_numbers: bool) -> Compared:
    row = first or second
    assert row is not None
    values = [None if found is None else found.value for found in (first, second)]
    name = f"{row.metric}, {row.compares}"
    if with_numbers:
        name += f", n = {row.n_generated:,}" + (f" and {row.n_real:,}" if row.n_real != row.n_generated else "")
    return Compared(name, row.better, values[0], values[1])


def _prompts(first: Side, second: Side) -> list[PromptPair]:
    def shown(side: Side, prompt: str) -> str | None:
        return data_uri(side.images[prompt].read_bytes()) if prompt in side.images else None

    prompts = {**first.images, **second.images}
    return [PromptPair(visible(prompt), shown(first, prompt), shown(second, prompt)) for prompt in prompts]
