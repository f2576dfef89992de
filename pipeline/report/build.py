"""report/index.html: one self-contained file. Images are data URIs, plots inline SVG, styles inline CSS.

What is on the page is also there as files of its own, for MLflow: plots/*.svg, grids/*.png (generated images with the
nearest training image beside each), metrics.csv and costs.json.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml
from PIL import Image

from pipeline.config.pipeline import PipelineConfig
from pipeline.data.shards import read_samples
from pipeline.evaluation.results import read_results
from pipeline.evaluation.rows import Row, warnings
from pipeline.report.plots import panels, standalone
from pipeline.report.run_facts import TRAINED, RunFacts, duration, read_facts, size
from pipeline.report.sweep_plots import sweep_facts
from pipeline.sampling.grid import Group, Tile, grid

_SMALL_PX = 48  # below, enlarging with interpolation shows nothing but blur


@dataclass(frozen=True)
class GeneratedImage:
    """A generated image, with the training image that it comes closest to."""

    prompt: str
    image: str  # data URI
    nearest_image: str
    nearest_caption: str
    distance: float
    score: float | None = None

    @property
    def both(self) -> tuple[str, str]:
        return self.image, self.nearest_image


@dataclass(frozen=True)
class Report:
    page: str
    files: dict[str, str | bytes]  # what it shows as files of their own, by path


def build_report(directories: Mapping[str, Path], config: PipelineConfig) -> Report:
    """The page and its parts, from the directories of all stages before it (by stage name)."""
    evaluation: Any = read_results(directories["evaluate"])
    facts = read_facts(directories)
    originals = _training_images(directories["prepare"], evaluation)
    prompted = _grouped(evaluation["nearest"], "kind", ("training", "new"), directories["generate"], originals)
    sampled = _grouped(evaluation["samples"], "group", ("random", "best", "worst"), directories["evaluate"], originals)
    curves = {name: panels(facts.stages[name].history, name) for name in TRAINED}
    sweep = sweep_facts(evaluation["sweep"]) if "sweep" in evaluation else None
    files: dict[str, str | bytes] = {
        f"plots/{name}-{re.sub(r'[^a-z0-9]+', '-', panel.title.lower())}.svg": standalone(panel.svg)
        for name, found in (*curves.items(), ("sweep", sweep.panels if sweep else []))
        for panel in found
    }
    groups = {**{f"prompts-{kind}": found for kind, found in prompted.items()}, **sampled}
    files |= {f"grids/{name}.png": sheet(name, found) for name, found in groups.items() if found}
    files |= {"metrics.csv": _csv(evaluation["rows"]), "costs.json": _costs(facts)}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"duration": duration, "size": size, "metric": _metric, "count": lambda n: f"{n:,}"}
    page = environment.get_template("template.html").render(
        title=config.report.title or config.name,
        facts=facts,
        trained=[facts.stages[name] for name in TRAINED],
        seed=config.seed,
        generated=prompted,
        sampled=sampled,
        sweep=sweep,
        reconstructions=[
            {
                **entry,
                "original": originals[entry["key"]],
                "image": _data_uri(directories["evaluate"] / entry["file"]),
            }
            for entry in evaluation["reconstructions"]
        ],
        panels=curves,
        tables=_tables(evaluation["rows"]),
        extractor=next((row for row in evaluation["rows"] if row["extractor"]), None),
        extractors=_extractors(evaluation["rows"]),
        judge=evaluation["scored_by"],
        candidates=config.generate.candidates,
        warnings=warnings(Row.from_json(row) for row in evaluation["rows"]),
        config=_config(config),
        credit=facts.index.get("credit"),
        rendering=_rendering(config, facts.index.get("image_size", 0)),
    )
    return Report(page, files)


def _grouped(
    entries: list[dict[str, Any]], by: str, groups: tuple[str, ...], directory: Path, originals: dict[str, str]
) -> dict[str, list[GeneratedImage]]:
    """The images of each of `groups`."""
    found: dict[str, list[GeneratedImage]] = {group: [] for group in groups}
    for entry in entries:
        generated = GeneratedImage(
            prompt=entry["prompt"],
            image=_data_uri(directory / entry["file"]),
            nearest_image=originals[entry["key"]],
            nearest_caption=entry["caption"],
            distance=entry["distance"],
            score=entry.get("score"),
        )
        found[entry[by]].append(generated)
    return found


def sheet(title: str, images: list[GeneratedImage]) -> bytes:
    """A PNG of the generated images, beside each the training image that is nearest to it."""
    tiles = []
    for generated in images:
        pair = [Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1]))).convert("RGB") for uri in generated.both]
        width, height = pair[0].size
        both = Image.new("RGB", (2 * width, 2 * width), "white")
        both.paste(pair[0], (0, (2 * width - height) // 2))
        both.paste(pair[1].resize(pair[0].size, Image.Resampling.NEAREST), (width, (2 * width - height) // 2))
        score = f" · {generated.score:.3g}" if generated.score is not None else ""
        tiles.append(Tile(both, f"{generated.prompt}{score}"))
    note = "Left what was generated, right the training image that it comes nearest to."
    result = io.BytesIO()
    grid([Group(title.replace("-", ", ").capitalize(), tiles, note)], columns=6, side=160).save(result, format="PNG")
    return result.getvalue()


def _csv(rows: list[dict[str, Any]]) -> str:
    """Every metric, a row each."""
    text = io.StringIO()
    names = [name for name in rows[0] if name != "interval"] if rows else []
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*names, "interval_low", "interval_high"])
    for row in rows:
        writer.writerow([*(row[name] for name in names), *(row["interval"] or ("", ""))])
    return text.getvalue()


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


def _extractors(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each network that metrics come from, with the labels by which they are named."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        if row["extractor"]:
            entry = {name: row[name] for name in ("extractor", "weights_sha256", "resize")}
            label = row["metric"].rpartition("(")[2].rstrip(")")
            labels = found.setdefault(tuple(entry.values()), entry | {"labels": []})["labels"]
            if label not in labels:
                labels.append(label)
    return list(found.values())


def _training_images(prepare: Path, evaluation: dict[str, Any]) -> dict[str, str]:
    """The real images that the page shows, by key, as data URIs."""
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
    """Metrics as rows, what they compare as columns, so that each stands beside its floor."""

    title: str
    columns: list[tuple[str, int]]  # what is compared, on how many images
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
    if "nearest training image" in metric:
        return "How near the training images are"
    if "reconstruction" in compares:
        return "Reconstructions of the image tokenizer"
    if "captions" in compares and ", their" in compares:
        return "Images against their captions"
    return "Set against set" if "," in compares else "Generated images beside real ones"


def _metric(value: float | None) -> str:
    """Three significant digits, as people write them."""
    if value is None:
        return "–"
    size = abs(value)
    text = f"{size:,.0f}" if size >= 100 else f"{size:.{1 if size >= 10 else 2 if size >= 1 else 3}f}"
    return f"−{text}" if value < 0 and text.strip("0.") else text


def _config(config: PipelineConfig) -> str:
    """Without what only says where and how the run ran: the page is the same wherever the run directory lies."""
    values = config.model_dump(mode="json", exclude={"runs", "processes", "tracking"})
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _rendering(config: PipelineConfig, image_size: int) -> str:
    wanted = config.report.enlargement
    if wanted == "auto":
        return "pixelated" if image_size < _SMALL_PX else "auto"
    return "pixelated" if wanted == "pixelated" else "auto"
