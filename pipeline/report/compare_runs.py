"""Two runs side by side: their metrics, and a page with the images that they generated of the same prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from pipeline.core.atomic_io import read_json
from pipeline.core.text import visible
from pipeline.evaluation.results import FILE, read_results, rows_in
from pipeline.evaluation.rows import Better, Row
from pipeline.report.numbers import metric
from pipeline.report.shown_images import data_uri


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


def compared_metrics(first: Path, second: Path) -> list[Compared]:
    """The metrics that both measured on the same kind of sets in the same features, then those that one has."""
    left, right = _rows(first), _rows(second)
    both = [key for key in left if key in right]
    keys = both + [key for key in {**left, **right} if key not in both]
    return [_compared(left.get(key), right.get(key)) for key in keys]


def comparison_page(first: Path, second: Path, keys: Sequence[str], rows: Sequence[Compared]) -> str:
    """One HTML file that holds its images."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("compare_runs.html").render(
        names=(first.name, second.name), keys=keys, rows=rows, prompts=_prompts(first, second), metric=metric
    )


def _rows(run: Path) -> dict[tuple[str, str, str | None], Row]:
    if not (run / "evaluate" / FILE).is_file():
        return {}
    return {(row.metric, row.compares, row.weights_sha256): row for row in rows_in(read_results(run / "evaluate"))}


def _compared(first: Row | None, second: Row | None) -> Compared:
    row = first or second
    assert row is not None
    values = [None if found is None else found.value for found in (first, second)]
    return Compared(f"{row.metric}, {row.compares}", row.better, values[0], values[1])


def _prompts(first: Path, second: Path) -> list[PromptPair]:
    left, right = _images(first), _images(second)
    return [PromptPair(visible(prompt), left.get(prompt), right.get(prompt)) for prompt in {**left, **right}]


def _images(run: Path) -> dict[str, str]:
    """The image of each prompt as a URI."""
    listed = run / "generate" / "prompts.json"
    entries = read_json(listed) if listed.is_file() else []
    return {entry["prompt"]: data_uri((run / "generate" / entry["file"]).read_bytes()) for entry in entries}
