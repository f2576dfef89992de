"""What lies in a directory of image shards or token arrays, in words: counts, sizes, captions, checksums."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TypeGuard

import numpy as np

from pipeline.core.atomic_io import read_json, write_atomic
from pipeline.core.errors import UserError
from pipeline.core.image_io import png_bytes
from pipeline.core.image_size import told
from pipeline.core.progress import progress
from pipeline.data import shards as image_shards
from pipeline.data.catalog import Catalog
from pipeline.data.images import grid
from pipeline.data.shard_file import ShardFile, check_shard
from pipeline.data.shards import PrepareIndex, Sample, Shards, read_index
from pipeline.data.splits import SPLITS
from pipeline.data.tokens import TokenArrays, TokenIndex, read_token_index

_CAPTIONS = 100_000  # read for the statistics of captions
_SHEET_COLUMNS = _SHEET_ROWS = 12  # images of the contact sheet
_USAGE_SAMPLES = 16_384  # read for the statistics of codes


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
            yield from _images(folder, read_index(folder), sheet, verify)
        elif _is_of_tokens(index):
            yield from _tokens(folder, read_token_index(folder), verify)
        else:
            raise UserError(f"{folder / 'index.json'} is an index of neither image shards nor token arrays")


def _is_of_images(index: object) -> TypeGuard[PrepareIndex]:
    return isinstance(index, dict) and "image_size" in index


def _is_of_tokens(index: object) -> TypeGuard[TokenIndex]:
    return isinstance(index, dict) and "levels" in index


def _images(folder: Path, index: PrepareIndex, sheet: Path | None, verify: bool) -> Iterator[str]:
    yield f"{folder}: images of {told(index['image_size'])}"
    for split in SPLITS:
        entry = index["splits"][split]
        shards = Shards(entry["shards"])
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


def _check_all(folder: Path, shards: Shards) -> None:
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
        captions = _with_captions(entry["samples"], entry["captions"])
        yield (
            f"  {split:<6}{entry['samples']:>12,} samples{captions} in {entry['shards']:,} shards, "
            f"{entry['crops']} crop{'s' if entry['crops'] != 1 else ''} each, {_size(entry['bytes'])}"
        )
        if not entry["shards"]:
            continue
        arrays = TokenArrays(folder, split)
        yield from _usage(arrays)
        if verify:
            arrays.verify(progress(range(arrays.shards), description="verify", unit="shard", shown=arrays.shards > 20))
    if verify:
        yield "  every array is what its checksum says"


def _usage(arrays: TokenArrays) -> Iterator[str]:
    """How much of each codebook, and of the caption's window, the first samples use."""
    samples = np.arange(min(len(arrays), _USAGE_SAMPLES))
    every = [arrays.gather(samples, np.full(len(samples), crop)) for crop in range(arrays.crops)]
    start = 0
    for number, level in enumerate(arrays.levels):
        used = np.unique(np.concatenate([codes[:, start : start + level.positions] for _, codes in every]))
        yield f"        level {number}: {len(used):,} of {level.codebook_size:,} codes are used"
        start += level.positions
    lengths = (every[0][0] != 0).sum(axis=1)
    full = (lengths == arrays.text_length).mean()
    yield f"        captions: {lengths.min()} to {lengths.max()} tokens; {full:.1%} fill the window"


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
