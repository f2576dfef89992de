"""The records of all parts -> rejected.jsonl, contact-sheet.png, the catalog, and index.json, which is written last."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.config.prepare import PrepareConfig
from pipeline.core.atomic_io import atomic_path, write_atomic
from pipeline.core.errors import UserError
from pipeline.core.image_io import png_bytes
from pipeline.core.text import visible
from pipeline.core.urls import mask
from pipeline.data.catalog_columns import FOLDER, saved_columns, write_catalog
from pipeline.data.images import grid
from pipeline.data.order import ShardOrder
from pipeline.data.prepare_part import PartTask, Rejection, opened_source
from pipeline.data.shard_file import ShardFile
from pipeline.data.shard_table import ShardEntry
from pipeline.data.shards import (
    CatalogEntry,
    PrepareIndex,
    Rejected,
    Shard,
    Shards,
    SplitIndex,
    index_path,
    write_index,
)
from pipeline.data.splits import SPLITS

log = logging.getLogger(__name__)

_SHEET_SIDE = 12  # images in each row and column of the contact sheet


@dataclass
class _Found:
    """What became of the samples of a source."""

    kept: int = 0  # captions, where a sample has several
    found: int = 0
    reasons: Counter[str] = field(default_factory=Counter)  # rejected
    passed_over: Counter[str] = field(default_factory=Counter)
    samples: Counter[str] = field(default_factory=Counter)  # kept, by split


def join_parts(directory: Path, config: PrepareConfig, tasks: Sequence[PartTask]) -> PrepareIndex:
    """Put the records of all parts together; what else lies there, of an earlier config or source, is removed.

    Raises:
        UserError: more samples of a source than allowed were rejected, or no training sample of it is left.
    """
    shards: dict[str, list[ShardEntry]] = {split: [] for split in SPLITS}
    conversions: Counter[str] = Counter()
    # As the tasks name them: those that they have listed know what they left out.
    sources = [opened_source(alone.all_sources[0], config.image_size) for alone in config.of_each_source()]
    founds = [_Found() for _ in sources]
    names = config.source_names if len(sources) > 1 else ()
    with atomic_path(directory / "rejected.jsonl") as temporary, open(temporary, "w") as file:
        for number, (found, source) in enumerate(zip(founds, sources, strict=True)):
            own = [task for task in tasks if task.source == number]
            found.passed_over.update(source.left_out())
            found.found += found.passed_over.total()
            for entry in _take_records(own, found, shards, conversions):
                file.write(mask(json.dumps(entry | ({"source": names[number]} if names else {}))) + "\n")
    for number, found in enumerate(founds):
        _check_source(directory, config, found, names[number] if names else "")
    _remove_others(directory, shards, tasks)
    for number, found in enumerate(founds):
        if found.samples["train"] == 0:
            of_source = f" of {names[number]}" if names else ""
            why = f"{directory / 'rejected.jsonl'} says why"
            raise UserError(f"prepare: expected training samples{of_source}, found none; {why}")
    _write_contact_sheet(directory, Shards(shards["train"]))
    rejected = sum((found.reasons for found in founds), Counter[str]())
    passed_over = sum((found.passed_over for found in founds), Counter[str]())
    index: PrepareIndex = {
        "image_size": config.image_size,
        "splits": {split: _of_split(found) for split, found in shards.items()},
        "catalog": _write_catalog(directory, tasks, shards),
        "rejected": _rejected(rejected),
        "left_out": dict(sorted(passed_over.items())),
        "source_samples": sum(found.found for found in founds),
        "conversions": dict(sorted(conversions.items())),
        "credit": "; ".join(dict.fromkeys(source.credit for source in sources if source.credit)) or None,
    }
    if config.storage != "png":
        index["storage"] = config.storage
    if names:
        for split in SPLITS:
            index["splits"][split]["sources"] = [found.samples[split] for found in founds]
    write_index(directory, index)
    _say(founds, names)
    return index


def _take_records(
    tasks: Sequence[PartTask], found: _Found, shards: dict[str, list[ShardEntry]], conversions: Counter[str]
) -> Iterator[Rejection]:
    """Add the parts of a source to `found`, `shards` and `conversions`; yields what was not kept."""
    typical = _typical_part(tasks)
    for task in tasks:
        record = task.record()
        for split, shard in record["shards"].items():
            shards[split].append(shard)
            found.samples[split] += shard["samples"]
            # Where a sample has several captions, each of them is counted.
            found.kept += shard.get("captions", shard["samples"])
        conversions.update(record["conversions"])
        found.passed_over.update(record["passed_over"])
        found.found += record["found"]
        for entry in record["rejected"] + record["left_out"]:
            if entry.pop("rest", False):
                lost = max(1, typical - record["found"])
                what = visible(f"{entry['key']}: {entry['reason']} ({entry['detail']})")
                log.warning("prepare: %s: counted as %d samples, by what the others hold", what, lost)
                entry["samples"] = entry.get("samples", 1) + lost
                found.found += lost
            found.reasons[entry["reason"]] += entry.get("samples", 1)
            yield entry


def _rejected(reasons: Counter[str]) -> Rejected:
    return {"samples": reasons.total(), "reasons": dict(sorted(reasons.items()))}


def _write_catalog(
    directory: Path, tasks: Sequence[PartTask], shards: Mapping[str, Sequence[ShardEntry]]
) -> dict[str, CatalogEntry]:
    """Write the catalog of each split; columns that an earlier config had are removed."""
    parts = {task.record_path.stem: task.columns_path for task in tasks}
    written = {}
    for split in SPLITS:
        files = [parts[Path(shard["name"]).stem] for shard in shards[split]]
        written[split] = write_catalog(directory, split, partial(saved_columns, files, split))
    wanted = {f"{split}.{name}" for split, entry in written.items() for name in (*entry["bytes"], "checksums")}
    for path in sorted((directory / FOLDER).iterdir()):
        if path.name not in wanted:
            path.unlink()
    return written


def _typical_part(tasks: Sequence[PartTask]) -> int:
    """How many samples a part holds that could be read to its end: the median, at least one."""
    records = (task.record() for task in tasks)
    whole = [r["found"] for r in records if not any(entry.get("rest") for entry in r["rejected"])]
    return int(np.median(whole)) if whole else 1


def _check_source(directory: Path, config: PrepareConfig, found: _Found, name: str) -> None:
    """`name`: of one of several sources.

    Raises:
        UserError: a sample of it is neither kept nor rejected nor left out, or too many were rejected.
    """
    kept, count, left_out = found.kept, found.reasons.total(), found.passed_over.total()
    if found.found != kept + count + left_out:
        raise UserError(
            f"prepare: the source holds {found.found} samples, but {kept} were kept, {count} rejected and {left_out} "
            "left out: please report this"
        )
    if count > config.max_rejected_fraction * (kept + count):
        counted = ", ".join(f"{number} {reason}" for reason, number in sorted(found.reasons.items()))
        raise UserError(
            f"prepare: {count} of {kept + count} samples{f' of {name}' if name else ''} rejected ({counted}), at most "
            f"{config.max_rejected_fraction:.0%} allowed: see {directory / 'rejected.jsonl'}, mend the source or raise "
            "prepare.max_rejected_fraction, for which nothing is prepared again"
        )


def _say(founds: Sequence[_Found], names: Sequence[str]) -> None:
    """One line a source for what was not kept, or is not one caption an image; a line each where there are several."""
    for number, found in enumerate(founds):
        kept, samples, rejected = found.kept, found.samples.total(), found.reasons.total()
        if rejected or found.passed_over or kept != samples or names:
            lost = [f"{rejected:,} rejected{_counted(found.reasons)}"] if rejected else []
            lost += (
                [f"{found.passed_over.total():,} left out{_counted(found.passed_over)}"] if found.passed_over else []
            )
            what = f"{kept:,} samples kept" if kept == samples else f"{kept:,} captions of {samples:,} images kept"
            log.info("prepare: %s%s", f"{names[number]}: " if names else "", ", ".join([what, *lost]))


def _counted(counts: Mapping[str, int]) -> str:
    return f" ({', '.join(f'{count:,} {name}' for name, count in sorted(counts.items()))})"


def _remove_others(directory: Path, shards: Mapping[str, Sequence[ShardEntry]], tasks: Sequence[PartTask]) -> None:
    """Remove shards and records that are no part of the result."""
    wanted = {path for task in tasks for path in (task.record_path, task.hashes_path, task.columns_path)}
    for split in SPLITS:
        for shard in shards[split]:
            path = directory / shard["name"]
            wanted |= {path, index_path(path)}
    for folder in ("parts", *SPLITS):
        for path in sorted((directory / folder).glob("*")):
            if path not in wanted:
                path.unlink()


def _of_split(shards: Sequence[ShardEntry]) -> SplitIndex:
    return {
        "samples": sum(shard["samples"] for shard in shards),
        "bytes": sum(shard["bytes"] for shard in shards),
        "captions": sum(shard.get("captions", shard["samples"]) for shard in shards),
        "shards": shards,
    }


def _write_contact_sheet(directory: Path, shards: Shards) -> None:
    """Training images from everywhere in the source, for a look."""
    counts = shards.samples.tolist()
    order = ShardOrder(counts, seed=0)
    samples, _ = order.locate(np.arange(min(_SHEET_SIDE**2, order.samples)))
    numbers = np.searchsorted(np.cumsum(counts), samples, side="right")
    rows = samples - (np.cumsum(counts) - counts)[numbers]
    images = (_image(directory, shards[shard], row) for shard, row in zip(numbers.tolist(), rows.tolist(), strict=True))
    write_atomic(directory / "contact-sheet.png", png_bytes(grid(images, _SHEET_SIDE)))


def _image(directory: Path, shard: Shard, row: int) -> Image.Image:
    return Image.fromarray(ShardFile(directory, shard).pixels(row).transpose(1, 2, 0))
