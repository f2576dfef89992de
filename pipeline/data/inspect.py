"""What lies in a directory of image shards or token arrays, in words: counts, sizes, captions, checksums."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TypeGuard

import numpy as np
from numpy.typing import NDArray

from pipeline.core.atomic_io import read_json, write_atomic
from pipeline.core.errors import UserError
from pipeline.core.image_io import png_bytes
from pipeline.core.progress import progress
from pipeline.data import shards as image_shards
from pipeline.data import tokens
from pipeline.data.catalog import Catalog
from pipeline.data.images import grid
from pipeline.data.shards import PrepareIndex, Sample, Shard, ShardFile, check_shard
from pipeline.data.sources.base import fault
from pipeline.data.splits import SPLITS
from pipeline.data.tokens import TokenIndex, TokenShard, check_arrays

_CAPTIONS = 100_000  # read for the statistics of captions
_SHEET_COLUMNS = _SHEET_ROWS = 12  # images of the contact sheet
_USAGE_SHARDS = 16  # read for the statistics of codes


def inspect_directory(path: Path, sheet: Path | None, verify: bool) -> Iterator[str]:
    """Lines that describe `path`: a run, or the directory of `prepare` or `tokenize`.

    Raises:
        UserError: there is nothing of that kind, or a file is not what its checksum says.
    """
    found = [folder for folder in (path, path / "prepare", path / "tokenize") if (folder / "index.json").is_file()]
    if not found:
        raise UserError(f"{path}: expected a run, or its prepare or tokenize directory, found no index.json")
    for folder in found:
        index: object = read_json(folder / "index.json")
        if _is_of_images(index):
            yield from _images(folder, index, sheet, verify)
        elif _is_of_tokens(index):
            yield from _tokens(folder, index, verify)
        else:
            raise UserError(f"{folder / 'index.json'} is an index of neither image shards nor token arrays")


def _is_of_images(index: object) -> TypeGuard[PrepareIndex]:
    return isinstance(index, dict) and "image_size" in index


def _is_of_tokens(index: object) -> TypeGuard[TokenIndex]:
    return isinstance(index, dict) and "levels" in index


def _images(folder: Path, index: PrepareIndex, sheet: Path | None, verify: bool) -> Iterator[str]:
    yield f"{folder}: images of {index['image_size']}x{index['image_size']}"
    for split in SPLITS:
        entry = index["splits"][split]
        shards = [Shard(**shard) for shard in entry["shards"]]
        captions = _with_captions(entry["samples"], image_shards.caption_count(entry))
        count = f"{entry['samples']:>12,} samples{captions}"
        yield f"  {split:<6}{count} in {len(shards):,} shards, {_size(entry['bytes'])}"
        if sources := entry.get("sources"):
            yield f"        of its sources: {', '.join(f'{samples:,}' for samples in sources)} samples"
        if shards:
            catalog = Catalog(folder, split, index)
            yield f"        captions: {_captions(catalog)}"
            yield from _numbers(catalog)
        if verify and shards:
            catalog.verify()
            _check_all(folder, shards)
    yield f"  rejected {index['rejected']['samples']:,}{_counted(index['rejected']['reasons'])}"
    if left_out := index.get("left_out"):
        yield f"  left out {sum(left_out.values()):,}{_counted(left_out)}"
    if index["conversions"]:
        yield f"  converted {sum(index['conversions'].values()):,}{_counted(index['conversions'])}"
    if verify:
        yield "  every shard is, byte for byte, as prepare wrote it, and so is the catalog"
    if sheet is not None:
        images = [sample.image for sample in islice(_spread(folder, index), _SHEET_COLUMNS * _SHEET_ROWS)]
        write_atomic(sheet, png_bytes(grid(images, _SHEET_COLUMNS)))
        yield f"  {len(images)} images: {sheet}"


def _check_all(folder: Path, shards: list[Shard]) -> None:
    for shard in progress(shards, description="verify", unit="shard", shown=len(shards) > 1):
        check_shard(folder, shard)
        images = ShardFile(folder, shard)
        for row in range(shard.samples):  # the index beside the tar leads to each image
            images.read(row)


def _spread(folder: Path, index: PrepareIndex) -> Iterator[Sample]:
    """Samples from everywhere."""
    counts = [index["splits"][split]["samples"] for split in SPLITS]
    chosen = np.unique(np.linspace(0, sum(counts) - 1, _SHEET_COLUMNS * _SHEET_ROWS).astype(np.int64))
    for split, count in zip(SPLITS, counts, strict=True):
        if count:
            yield from Catalog(folder, split, index).samples(chosen[chosen < count].tolist())
        chosen = chosen[chosen >= count] - count


def _captions(catalog: Catalog) -> str:
    captions = list(catalog.caption_sample(_CAPTIONS, seed=0))
    lengths = np.array([len(caption) for caption in captions])
    part = f" (of {_CAPTIONS:,}, drawn at random)" if catalog.caption_count > _CAPTIONS else ""
    return (
        f"{lengths.min()} to {lengths.max()} characters, median {np.median(lengths):.0f}, 95 % up to "
        f"{np.quantile(lengths, 0.95):.0f}; {len(set(captions)):,} different{part}"
    )


def _numbers(catalog: Catalog) -> Iterator[str]:
    """A line for each number that the samples came with, of those that `_captions` looks at at most."""
    rows = np.unique(np.linspace(0, len(catalog) - 1, min(len(catalog), _CAPTIONS)).astype(np.int64))
    for name in catalog.numbers():
        values = catalog.number(name, rows)
        known = values[~np.isnan(values)]
        yield f"        {name}: {known.min():g} to {known.max():g}, median {np.median(known):g}" if len(known) else ""


def _tokens(folder: Path, index: TokenIndex, verify: bool) -> Iterator[str]:
    grids = ", ".join(f"{v['height']}x{v['width']} of {v['codebook_size']:,}" for v in index["levels"])
    yield f"{folder}: codes {grids}; captions of {index['text_length']} tokens of {index['text_vocab_size']:,}"
    for split in SPLITS:
        entry = index["splits"][split]
        names = [name for shard in entry["shards"] for name in shard["sha256"]]
        size = sum((folder / name).stat().st_size for name in names if (folder / name).is_file())
        crops = entry["shards"][0]["crops"] if entry["shards"] else 0
        captions = _with_captions(entry["samples"], tokens.caption_count(entry))
        yield (
            f"  {split:<6}{entry['samples']:>12,} samples{captions} in {len(entry['shards']):,} shards, "
            f"{crops} crop{'s' if crops != 1 else ''} each, {_size(size)}"
        )
        if entry["shards"]:
            yield from _usage(folder, index, entry["shards"])
        if verify:
            for shard in progress(entry["shards"], description="verify", unit="shard", shown=len(names) > 20):
                check_arrays(folder, shard)
    if verify:
        yield "  every array is what its checksum says"


def _usage(folder: Path, index: TokenIndex, shards: list[TokenShard]) -> Iterator[str]:
    """How much of each codebook, and of the caption's window, the first shards use."""
    first = shards[:_USAGE_SHARDS]
    for level, grid_of_level in enumerate(index["levels"]):
        used = np.unique(np.concatenate([np.unique(_array(folder / s["codes"][level])) for s in first]))
        yield f"        level {level}: {len(used):,} of {grid_of_level['codebook_size']:,} codes are used"
    lengths = np.concatenate([(_array(folder / shard["text"]) != 0).sum(axis=1) for shard in first])
    full = (lengths == index["text_length"]).mean()
    yield f"        captions: {lengths.min()} to {lengths.max()} tokens; {full:.1%} fill the window"


def _array(path: Path) -> NDArray[np.uint16 | np.uint32]:
    try:
        array: NDArray[np.uint16 | np.uint32] = np.load(path, mmap_mode="r")
        return array
    except Exception as error:  # numpy reads a header as Python, which fails in some ten ways
        raise UserError(f"{path} is missing or damaged: {fault(error)}: run the stage tokenize again") from error


def _with_captions(samples: int, captions: int) -> str:
    return f" with {captions:,} captions" if captions != samples else ""


def _counted(counts: dict[str, int]) -> str:
    return f" ({', '.join(f'{count:,} {name}' for name, count in counts.items())})" if counts else ""


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1_000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1_000
    return f"{count:,.1f} TB"
