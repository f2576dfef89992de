"""The records of all parts -> rejected.jsonl, contact-sheet.png, the catalog, and index.json, which is written last."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.config.prepare import PrepareConfig
from pipeline.core.atomic_io import atomic_path, write_atomic, write_json
from pipeline.core.errors import UserError
from pipeline.core.image_io import png_bytes
from pipeline.core.text import visible
from pipeline.core.urls import mask
from pipeline.data.catalog_columns import FOLDER, saved_columns, write_catalog
from pipeline.data.images import grid
from pipeline.data.order import ShardOrder
from pipeline.data.prepare_part import PartTask, opened_source
from pipeline.data.shards import (
    CatalogEntry,
    PrepareIndex,
    Rejected,
    Shard,
    ShardFile,
    SplitIndex,
    caption_count,
    index_path,
)
from pipeline.data.splits import SPLITS

log = logging.getLogger(__name__)

_SHEET_SIDE = 12  # images in each row and column of the contact sheet


def write_index(directory: Path, config: PrepareConfig, tasks: Sequence[PartTask]) -> PrepareIndex:
    """Put the records of all parts together; what else lies there, of an earlier config or source, is removed.

    Raises:
        UserError: more samples than allowed were rejected, or no training sample is left.
    """
    splits: dict[str, SplitIndex] = {split: {"samples": 0, "bytes": 0, "shards": []} for split in SPLITS}
    conversions: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    source = opened_source(config.source, config.image_size)
    passed_over = Counter(source.left_out())
    found = passed_over.total()
    typical = _typical_part(tasks)
    with atomic_path(directory / "rejected.jsonl") as temporary, open(temporary, "w") as file:
        for task in tasks:
            record = task.record()
            for split, shard in record["shards"].items():
                splits[split]["shards"].append(shard)
                splits[split]["samples"] += shard["samples"]
                splits[split]["bytes"] += shard["bytes"]
            conversions.update(record["conversions"])
            passed_over.update(record["passed_over"])
            found += record["found"]
            for entry in record["rejected"] + record["left_out"]:
                if entry.pop("rest", False):
                    lost = max(1, typical - record["found"])
                    what = visible(f"{entry['key']}: {entry['reason']} ({entry['detail']})")
                    log.warning("prepare: %s: counted as %d samples, by what the others hold", what, lost)
                    entry["samples"] = entry.get("samples", 1) + lost
                    found += lost
                reasons[entry["reason"]] += entry.get("samples", 1)
                file.write(mask(json.dumps(entry)) + "\n")
    rejected: Rejected = {"samples": reasons.total(), "reasons": dict(sorted(reasons.items()))}
    # Where a sample has several captions, each of them is counted.
    kept = sum(caption_count(split) for split in splits.values())
    _check_complete(found, kept, rejected["samples"], passed_over.total())
    _check_rejected(directory, config, kept, rejected)
    _remove_others(directory, splits, tasks)
    if splits["train"]["samples"] == 0:
        raise UserError(f"prepare: expected training samples, found none; {directory / 'rejected.jsonl'} says why")
    _write_contact_sheet(directory, [Shard(**shard) for shard in splits["train"]["shards"]])
    index: PrepareIndex = {
        "image_size": config.image_size,
        "splits": splits,
        "catalog": _write_catalog(directory, tasks, splits),
        "rejected": rejected,
        "left_out": dict(sorted(passed_over.items())),
        "source_samples": found,
        "conversions": dict(sorted(conversions.items())),
        "credit": source.credit,
    }
    if config.storage != "png":
        index["storage"] = config.storage
    write_json(directory / "index.json", index)
    _say(kept, sum(split["samples"] for split in splits.values()), rejected, passed_over)
    return index


def _write_catalog(
    directory: Path, tasks: Sequence[PartTask], splits: Mapping[str, SplitIndex]
) -> dict[str, CatalogEntry]:
    """Write the catalog of each split; columns that an earlier config had are removed."""
    parts = {task.record_path.stem: task.columns_path for task in tasks}
    written = {}
    for split in SPLITS:
        files = [parts[Path(shard["name"]).stem] for shard in splits[split]["shards"]]
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


def _check_complete(found: int, kept: int, rejected: int, left_out: int) -> None:
    """Raises UserError when a sample of the source is neither kept nor rejected nor left out."""
    if found != kept + rejected + left_out:
        raise UserError(
            f"prepare: the source holds {found} samples, but {kept} were kept, {rejected} rejected and {left_out} left "
            "out: please report this"
        )


def _say(kept: int, samples: int, rejected: Rejected, passed_over: Counter[str]) -> None:
    """One line for what was not kept, or is not one caption an image."""
    if rejected["samples"] or passed_over or kept != samples:
        lost = [f"{rejected['samples']:,} rejected{_counted(rejected['reasons'])}"] if rejected["samples"] else []
        lost += [f"{passed_over.total():,} left out{_counted(passed_over)}"] if passed_over else []
        what = f"{kept:,} samples kept" if kept == samples else f"{kept:,} captions of {samples:,} images kept"
        log.info("prepare: %s", ", ".join([what, *lost]))


def _counted(counts: Mapping[str, int]) -> str:
    return f" ({', '.join(f'{count:,} {name}' for name, count in sorted(counts.items()))})"


def _check_rejected(directory: Path, config: PrepareConfig, kept: int, rejected: Rejected) -> None:
    count = rejected["samples"]
    if count > config.max_rejected_fraction * (kept + count):
        counted = ", ".join(f"{number} {reason}" for reason, number in rejected["reasons"].items())
        raise UserError(
            f"prepare: {count} of {kept + count} samples rejected ({counted}), at most "
            f"{config.max_rejected_fraction:.0%} allowed: see {directory / 'rejected.jsonl'}, mend the source or raise "
            "prepare.max_rejected_fraction"
        )


def _remove_others(directory: Path, splits: dict[str, SplitIndex], tasks: Sequence[PartTask]) -> None:
    """Remove shards and records that are no part of the result."""
    wanted = {path for task in tasks for path in (task.record_path, task.hashes_path, task.columns_path)}
    for split in SPLITS:
        for shard in splits[split]["shards"]:
            path = directory / shard["name"]
            wanted |= {path, index_path(path)}
    for folder in ("parts", *SPLITS):
        for path in sorted((directory / folder).glob("*")):
            if path not in wanted:
                path.unlink()


def _write_contact_sheet(directory: Path, shards: Sequence[Shard]) -> None:
    """Training images from everywhere in the source, for a look."""
    order = ShardOrder([shard.samples for shard in shards], seed=0)
    located = zip(*order.locate(np.arange(min(_SHEET_SIDE**2, order.samples))), strict=True)
    images = [_image(directory, shards[shard], row) for shard, row in located]
    write_atomic(directory / "contact-sheet.png", png_bytes(grid(images, _SHEET_SIDE)))


def _image(directory: Path, shard: Shard, row: int) -> Image.Image:
    return Image.fromarray(ShardFile(directory, shard).pixels(row).transpose(1, 2, 0))
