"""The model card of an export: what the run's own files say of data, models, losses and metrics."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import cast

import yaml

from pipeline.config.pipeline import PipelineConfig, load_pipeline
from pipeline.core.atomic_io import read_json
from pipeline.core.image_size import told
from pipeline.core.weights import count_parameters
from pipeline.data.sources.openmoji import LICENSE as OPENMOJI
from pipeline.orchestration.run_directory import RunDirectory, config_of
from pipeline.orchestration.tracking import read_history
from pipeline.sampling.model_source import ModelSource

_LOSSES = {
    "image-tokenizer": ("val/psnr", "val/codebook_usage", "val/codebook_perplexity"),
    "transformer": ("val/loss/image", "val/loss/text", "val/accuracy/image"),
    "tune": ("val/reward",),
}
_LIMITS = {
    "raster": "Codes are drawn in raster order: a filled region does not know what stays below it and right of it.",
    "any": "Codes are drawn in any order, a filled region's last; those of one pass do not know of each other, so fewer"
    " passes are faster and fit together less.",
    "scale": "Codes are drawn grid by grid, coarse to fine; those of one grid do not know of each other, and a filled"
    " region sees what stays on coarser grids alone.",
}


def model_card(run_directory: Path, source: ModelSource, has_grid: bool) -> str:
    """The card of a finished run, in Markdown; `has_grid`: prompts.png lies beside it."""
    config = load_pipeline(config_of(run_directory))
    prepared = RunDirectory(run_directory).manifest("prepare")
    # The config may have changed since; the data is what was prepared.
    section = cast(dict[str, object], prepared["config"]["prepare"]) if prepared else config.prepare.model_dump()
    sources = cast(list[dict[str, str]], section.get("sources") or [section["source"]])
    kind = ", ".join(dict.fromkeys(source["kind"] for source in sources))
    index = read_json(run_directory / "prepare" / "index.json")
    splits = index["splits"]
    layout = read_json(source.transformer / "config.json")["layout"]
    levels = " + ".join(f"{v['height']}×{v['width']} codes of {v['codebook_size']}" for v in layout["levels"])
    parts = [
        _front_matter(kind, index, source),
        f"# {config.name}",
        f"Generates images of {told(index['image_size'])} pixels from a caption, token by token:"
        f" a Smalti run, exported. Model hash `{source.model_hash}`.",
        "![What it generates](prompts.png)" if has_grid else "",
        "## Use",
        _use(),
        "## Data",
        f"Source: `{kind}`. {splits['train']['samples']:,} captioned images for training,"
        f" {splits['val']['samples']:,} for validation.",
        _licence(kind, index),
        "## Models",
        _table(("model", "parameters", "what it is"), _models(source, config, levels, layout)),
        "## At the end of training",
        _table(("stage", "steps", "metric", "value"), _losses(run_directory)),
        "## Metrics",
        _metrics(run_directory),
        "## Limits",
        "Each metric carries its extractor and sample counts, and compares with nothing else. The model knows the words"
        " and the things of its captions only, and a small data set comes back mostly as it went in."
        f" {_LIMITS[config.transformer.order]}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(kind: str, index: dict[str, object], source: ModelSource) -> str:
    """What hubs of models read: YAML between lines of dashes, in the words of Hugging Face's model cards."""
    known = kind == "openmoji"
    about: dict[str, object] = {
        "license": OPENMOJI["license"].lower().replace(" ", "-") if known else "unknown",
        "library_name": "smalti",
        "pipeline_tag": "text-to-image",
        "tags": ["text-to-image", "smalti", *(["reranker"] if source.reranker else [])],
    }
    if known:
        about["datasets"] = ["openmoji"]
    if index.get("credit"):
        about["dataset_credit"] = str(index["credit"])
    return f"---\n{yaml.safe_dump(about, sort_keys=False, allow_unicode=True, width=1_000)}---"


def _use() -> str:
    return """```python
from pipeline import Pipeline

pipeline = Pipeline.from_pretrained("this folder")
generated = pipeline.generate(["red heart"], candidates=4, seed=7, sampling=pipeline.source.sampling)
generated[0].image.save("heart.png")
```

    smalti generate "this folder" "red heart" -n 4 --seed 7 -o image.png"""


def _licence(kind: str, index: dict[str, object]) -> str:
    credit = index.get("credit")
    if kind == "openmoji":
        return (
            f"Images by [{OPENMOJI['credit']}]({OPENMOJI['url']}), {OPENMOJI['license']}. What the model generates"
            " derives from them and is shared under the same licence."
        )
    return str(credit) if credit else "Licence of the images: the run does not record one; ask who exported this."


def _models(
    source: ModelSource, config: PipelineConfig, levels: str, layout: dict[str, object]
) -> Iterable[tuple[object, ...]]:
    shape = config.transformer
    yield "text tokenizer", "–", f"BPE, {layout['text_vocab_size']:,} tokens, {layout['text_length']} per caption"
    yield "image tokenizer", _parameters(source.image_tokenizer), f"{config.image_tokenizer.kind}: {levels}"
    what = f"{shape.layers} layers, width {shape.width}, {shape.heads} heads"
    yield "transformer", _parameters(source.transformer), what
    if source.reranker:
        yield (
            "reranker",
            _parameters(source.reranker),
            "embeds images and captions into one space; keeps the best candidates",
        )


def _parameters(folder: Path) -> str:
    count = count_parameters(folder)
    return "–" if count is None else f"{count:,}"


def _losses(run_directory: Path) -> Iterable[tuple[object, ...]]:
    for stage, names in _LOSSES.items():
        newest_first = read_history(run_directory / stage)[::-1]
        best = next((line["best/step"] for line in newest_first if "best/step" in line), math.inf)
        for name in names:  # at the step whose weights are the model
            if last := next((line for line in newest_first if name in line and line["step"] <= best), None):
                yield stage, int(last["step"]), name, f"{last[name]:.4g}"
    retrieval = run_directory / "reranker" / "retrieval.json"
    if retrieval.is_file():
        for name, value in read_json(retrieval).items():
            yield "reranker", "–", name, f"{value:.4g}"


def _metrics(run_directory: Path) -> str:
    path = run_directory / "evaluate" / "metrics.json"
    if not path.is_file() or not RunDirectory(run_directory).is_of_these_inputs("evaluate"):
        return "The run has not been evaluated."
    rows = [row for row in read_json(path)["rows"] if row["value"] is not None]
    head = ("metric", "compares", "value", "real", "generated", "note")
    return _table(head, map(_metric_cells, rows))


def _metric_cells(row: dict[str, object]) -> tuple[object, ...]:
    counts = [row.get(name) or "–" for name in ("n_real", "n_generated")]
    return row["metric"], row["compares"], f"{row['value']:.4g}", *counts, row.get("warning") or ""


def _table(head: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
