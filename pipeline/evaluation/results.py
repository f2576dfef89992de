"""evaluate/metrics.json: what the stage evaluate writes and the report reads."""

from __future__ import annotations

from pathlib import Path
from typing import NotRequired, TypedDict

from pipeline.core.atomic_io import read_json
from pipeline.evaluation.rows import Row

FILE = "metrics.json"


class NearestEntry(TypedDict):
    """The training image that a generated one comes closest to in feature space."""

    key: str
    caption: str
    distance: float


class PromptEntry(NearestEntry):
    """An image of the prompt grid; `file` is below the stage generate."""

    prompt: str
    kind: str  # "training" | "new"
    file: str
    score: NotRequired[float]


class SampleEntry(NearestEntry):
    """An image of the sample set; `file` is below the stage evaluate."""

    group: str  # "random" | "best" | "worst"
    prompt: str
    file: str
    score: NotRequired[float]


class ReconstructionEntry(TypedDict):
    """A reconstruction, as a file below the stage evaluate; PSNR in dB."""

    key: str
    caption: str | None
    split: str  # "train" | "val"
    file: str
    psnr: float


class SweepSetting(TypedDict):
    """A setting of sampling, and its metrics by name."""

    guidance: float
    temperature: float
    top_k: int | None
    metrics: dict[str, float | None]


class SweepResult(TypedDict):
    """What a sweep measured: every setting, on `samples` images each."""

    settings: list[SweepSetting]
    best: int  # index of the setting with the lowest Fréchet distance
    compares: str
    samples: int


class Results(TypedDict):
    """The whole file. `scored_by` names the scores of the samples: the reranker, CLIP score, or nothing."""

    rows: list[dict[str, object]]  # Row.as_json
    nearest: list[PromptEntry]
    scored_by: str | None
    samples: list[SampleEntry]
    reconstructions: list[ReconstructionEntry]
    sweep: NotRequired[SweepResult]


def read_results(directory: Path) -> Results:
    """The results in the directory of a finished stage evaluate. Raises UserError when they are damaged."""
    found = read_json(directory / FILE)
    if "judge" in found:  # its name in files of before
        found["scored_by"] = found.pop("judge")
    results: Results = found
    return results


def rows_in(results: Results) -> list[Row]:
    """The measured metrics."""
    return [Row.from_json(entry) for entry in results["rows"]]
