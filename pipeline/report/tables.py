"""The tables of metrics: on the page, and as metrics.csv."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from pipeline.evaluation.judged import METRIC as JUDGED
from pipeline.evaluation.rows import Better, Row


@dataclass(frozen=True)
class Table:
    """Metrics as rows, what they compare as columns, so that each stands beside its floor."""

    title: str
    columns: list[tuple[str, int]]  # what is compared, on how many images
    rows: list[tuple[str, Better, list[Row]]]  # metric, better, cells


@dataclass(frozen=True)
class UsedExtractor:
    """A network that metrics come from, with the labels by which they are named."""

    name: str
    weights_sha256: str
    resize: str
    labels: list[str]


def tables(rows: Sequence[Row]) -> list[Table]:
    """One table for each group of metrics that are measured on the same pairs of sets."""
    cells: dict[str, list[Row]] = {}
    for row in rows:
        cells.setdefault(row.metric, []).append(row)
    groups: dict[tuple[tuple[str, int], ...], list[str]] = {}
    for metric, measured in cells.items():
        columns = tuple((row.compares, row.n_generated) for row in measured)
        groups.setdefault(columns, []).append(metric)
    return [
        Table(
            title=_title(metrics[0], columns[0][0]),
            columns=list(columns),
            rows=[(metric, cells[metric][0].better, cells[metric]) for metric in metrics],
        )
        for columns, metrics in groups.items()
    ]


def used_extractors(rows: Sequence[Row]) -> list[UsedExtractor]:
    """Each network that metrics come from, in the order of the rows."""
    labels: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row.extractor:
            label = row.metric.rpartition("(")[2].rstrip(")")
            known = labels.setdefault((row.extractor, row.weights_sha256 or "", row.resize or ""), [])
            if label not in known:
                known.append(label)
    return [UsedExtractor(name, sha256, resize, found) for (name, sha256, resize), found in labels.items()]


def metrics_csv(rows: Sequence[Row]) -> str:
    """Every metric on a line of its own."""
    text = io.StringIO()
    entries = [asdict(row) for row in rows]
    names = [name for name in entries[0] if name != "interval"] if entries else []
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*names, "interval_low", "interval_high"])
    for entry in entries:
        writer.writerow([*(entry[name] for name in names), *(entry["interval"] or ("", ""))])
    return text.getvalue()


def _title(metric: str, compares: str) -> str:
    if metric.startswith(f"{JUDGED},"):
        return "Prompts, judged by pixels"
    if "training image" in metric:
        return "Distance to the training images"
    if "reconstruction" in compares:
        return "Reconstructions of the image tokenizer"
    if "captions" in compares and ", their" in compares:
        return "Images against their captions"
    return "Set against set" if "," in compares else "Generated images beside real ones"
