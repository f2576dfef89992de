"""report/index.html: one self-contained file. Images are data URIs, plots inline SVG, styles inline CSS.

What is on the page is also there as files of its own, for MLflow: plots/*.svg, grids/*.png (generated images with the
nearest training image beside each), metrics.csv and costs.json.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jinja2
import yaml

from pipeline.config.pipeline import PipelineConfig
from pipeline.core.image_size import height_width, told
from pipeline.evaluation.results import Results, read_results, rows_in
from pipeline.evaluation.rows import warnings
from pipeline.orchestration.worth_a_look import worth_a_look
from pipeline.report.numbers import count, duration, metric, size
from pipeline.report.plots import Panel, panels, standalone
from pipeline.report.run_facts import RunFacts, read_facts
from pipeline.report.shown_images import ShownImages, data_uri
from pipeline.report.sweep_plots import SweepFacts, sweep_facts
from pipeline.report.tables import metrics_csv, tables, used_extractors

_SMALL_PX = 48  # below, enlarging with interpolation shows nothing but blur


@dataclass(frozen=True)
class Report:
    """The page, and what it shows as files of their own, by path."""

    page: str
    files: dict[str, str | bytes]


def build_report(directories: Mapping[str, Path], config: PipelineConfig) -> Report:
    """The page and its parts, from the directories of all stages before it (by stage name)."""
    results = read_results(directories["evaluate"])
    facts = read_facts(directories)
    images = ShownImages(dict(directories), results)
    curves = {stage.name: panels(stage.history, stage.name, stage.best) for stage in facts.trained}
    sweep = sweep_facts(results["sweep"]) if "sweep" in results else None
    files: dict[str, str | bytes] = {**_plots(curves, sweep), **images.sheets()}
    files |= {"metrics.csv": metrics_csv(rows_in(results)), "costs.json": _costs(facts)}
    findings = worth_a_look(config, directories)
    return Report(_page(config, facts, results, images, curves, sweep, findings), files)


def _page(
    config: PipelineConfig,
    facts: RunFacts,
    results: Results,
    images: ShownImages,
    curves: Mapping[str, list[Panel]],
    sweep: SweepFacts | None,
    findings: list[str],
) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = {"duration": duration, "size": size, "metric": metric, "count": count, "uri": data_uri, "told": told}
    environment.filters |= filters
    rows = rows_in(results)
    return environment.get_template("template.html").render(
        title=config.report.title or config.name,
        facts=facts,
        seed=config.seed,
        images=images,
        sweep=sweep,
        panels=curves,
        tables=tables(rows),
        extractors=used_extractors(rows),
        scored_by=results["scored_by"],
        candidates=config.generate.candidates,
        warnings=warnings(rows),
        findings=findings,
        config=_config(config),
        credit=facts.index.get("credit"),
        rendering=_rendering(config, facts.index.get("image_size", 0)),
        aspect=_aspect(facts.index.get("image_size", 1)),
    )


def _plots(curves: Mapping[str, list[Panel]], sweep: SweepFacts | None) -> dict[str, str]:
    """Each plot as an SVG file, by path."""
    groups = {**curves, "sweep": sweep.panels if sweep else []}
    return {
        f"plots/{name}-{re.sub(r'[^a-z0-9]+', '-', panel.title.lower())}.svg": standalone(panel.svg)
        for name, found in groups.items()
        for panel in found
    }


def _costs(facts: RunFacts) -> str:
    stages = {
        name: {
            "wall_time_s": stage.wall_time_s,
            "samples_per_s": stage.samples_per_s,
            "written_bytes": stage.output_bytes,
            "parameters": stage.parameters,
        }
        for name, stage in facts.stages.items()
    }
    about = {"stages": stages, "wall_time_s": facts.wall_time_s, "versions": facts.versions, "code": facts.code}
    return json.dumps(about, indent=2) + "\n"


def _config(config: PipelineConfig) -> str:
    """The config but for where and how the run ran: the page is the same wherever the run directory lies."""
    values = config.model_dump(mode="json", exclude={"runs", "processes", "tracking"})
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _aspect(image_size: int | list[int]) -> str:
    """CSS's aspect-ratio."""
    height, width = height_width(image_size)
    return f"{width} / {height}"


def _rendering(config: PipelineConfig, image_size: int | list[int]) -> str:
    """CSS's image-rendering."""
    wanted = config.report.enlargement
    if wanted == "auto":
        return "pixelated" if max(height_width(image_size)) < _SMALL_PX else "auto"
    return "pixelated" if wanted == "pixelated" else "auto"
