"""report/index.html: one self-contained file. Pictures are data URIs, plots inline SVG, styles inline CSS."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml

from pipeline.data.shards import read_samples
from pipeline.files import read_json
from pipeline.graph import PipelineConfig
from pipeline.report.plots import panels, standalone
from pipeline.report.run_facts import TRAINED, duration, read_facts, size
from pipeline.report.sweep_plots import sweep_facts

_SMALL_PX = 48  # below, enlarging with interpolation shows nothing but blur


@dataclass(frozen=True)
class Painted:
    """A painted picture, with the training picture that it comes closest to."""

    prompt: str
    picture: str  # data URI
    nearest_picture: str
    nearest_caption: str
    distance: float
    score: float | None = None


@dataclass(frozen=True)
class Report:
    page: str
    plots: dict[str, str]  # each of its plots as an SVG file of its own, by file name


def build_report(directories: Mapping[str, Path], config: PipelineConfig) -> Report:
    """The page and its plots, from the directories of all stages before it (by stage name)."""
    evaluation = read_json(directories["evaluate"] / "metrics.json")
    facts = read_facts(directories)
    originals = _training_pictures(directories["prepare"], evaluation)
    prompted = _grouped(evaluation["nearest"], "kind", ("training", "new"), directories["generate"], originals)
    sampled = _grouped(evaluation["samples"], "group", ("random", "best", "worst"), directories["evaluate"], originals)
    curves = {name: panels(facts.stages[name].history, name) for name in TRAINED}
    sweep = sweep_facts(evaluation["sweep"]) if "sweep" in evaluation else None
    plots = {
        f"{name}-{re.sub(r'[^a-z0-9]+', '-', panel.title.lower())}.svg": standalone(panel.svg)
        for name, found in (*curves.items(), ("sweep", sweep.panels if sweep else []))
        for panel in found
    }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"duration": duration, "size": size, "figure": _figure, "count": lambda n: f"{n:,}"}
    page = environment.get_template("template.html").render(
        title=config.report.title or config.name,
        facts=facts,
        trained=[facts.stages[name] for name in TRAINED],
        seed=config.seed,
        painted=prompted,
        sampled=sampled,
        sweep=sweep,
        reconstructions=[
            {
                **entry,
                "original": originals[entry["key"]],
                "picture": _data_uri(directories["evaluate"] / entry["file"]),
            }
            for entry in evaluation["reconstructions"]
        ],
        panels=curves,
        tables=_tables(evaluation["rows"]),
        extractor=next((row for row in evaluation["rows"] if row["extractor"]), None),
        warnings=_warnings(evaluation["rows"]),
        config=_config(config),
        credit=facts.index.get("credit"),
        rendering=_rendering(config, facts.index.get("image_size", 0)),
    )
    return Report(page, plots)


def _grouped(
    entries: list[dict[str, Any]], by: str, groups: tuple[str, ...], directory: Path, originals: dict[str, str]
) -> dict[str, list[Painted]]:
    """The pictures of each of `groups`."""
    found: dict[str, list[Painted]] = {group: [] for group in groups}
    for entry in entries:
        painted = Painted(
            prompt=entry["prompt"],
            picture=_data_uri(directory / entry["file"]),
            nearest_picture=originals[entry["key"]],
            nearest_caption=entry["caption"],
            distance=entry["distance"],
            score=entry.get("score"),
        )
        found[entry[by]].append(painted)
    return found


def _training_pictures(prepare: Path, evaluation: dict[str, Any]) -> dict[str, str]:
    """The real pictures that the page shows, by key, as data URIs."""
    shown = (*evaluation["nearest"], *evaluation["samples"], *evaluation["reconstructions"])
    missing = {entry["key"] for entry in shown}
    splits = {"train", *(entry["split"] for entry in evaluation["reconstructions"])}
    found: dict[str, str] = {}
    for split in sorted(splits):
        for sample in read_samples(prepare, split):
            if not missing:
                break
            if sample.key in missing:
                missing.discard(sample.key)
                found[sample.key] = _as_data_uri(sample.png)
    return found


def _data_uri(path: Path) -> str:
    return _as_data_uri(path.read_bytes())


def _as_data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


@dataclass(frozen=True)
class Table:
    """Figures as rows, what they compare as columns, so that each stands beside its floor."""

    title: str
    columns: list[tuple[str, int]]  # what is compared, on how many pictures
    rows: list[tuple[str, str, list[dict[str, Any]]]]  # metric, better, cells


def _tables(rows: list[dict[str, Any]]) -> list[Table]:
    """One table for each group of metrics that are measured on the same pairs of sets."""
    cells: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault(row["metric"], []).append(row)
    groups: dict[tuple[tuple[str, int], ...], list[str]] = {}
    for metric, measured in cells.items():
        columns = tuple((row["compares"], row["n_generated"]) for row in measured)
        groups.setdefault(columns, []).append(metric)
    return [
        Table(
            _title(metrics[0], columns[0][0]),
            list(columns),
            [(metric, cells[metric][0]["better"], cells[metric]) for metric in metrics],
        )
        for columns, metrics in groups.items()
    ]


def _title(metric: str, compares: str) -> str:
    if "nearest training picture" in metric:
        return "How near the training pictures are"
    if "reconstruction" in compares:
        return "Reconstructions of the image tokenizer"
    if "captions" in compares and ", their" in compares:
        return "Pictures against their captions"
    return "Set against set" if "," in compares else "Generated pictures beside real ones"


def _warnings(rows: list[dict[str, Any]]) -> list[str]:
    """Each warning once, in the order of the rows."""
    return list(dict.fromkeys(f"{row['metric']}: {row['warning']}" for row in rows if row["warning"]))


def _figure(value: float | None) -> str:
    """Three significant digits, as people write them."""
    if value is None:
        return "–"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}" if abs(value) >= 1 else f"{value:.3f}"


def _config(config: PipelineConfig) -> str:
    """Without what only says where and how the run ran: the page is the same wherever the run directory lies."""
    values = config.model_dump(mode="json", exclude={"runs", "processes", "tracking"})
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _rendering(config: PipelineConfig, image_size: int) -> str:
    wanted = config.report.enlargement
    if wanted == "auto":
        return "pixelated" if image_size < _SMALL_PX else "auto"
    return "pixelated" if wanted == "pixelated" else "auto"
