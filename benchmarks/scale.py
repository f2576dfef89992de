"""What the starts of stages cost when the data set grows: time, bytes read, files opened, peak memory.

    python -m benchmarks.scale starts runs/scale 100000 1000000 10000000
    python -m benchmarks.scale duplicates 100000 1000000 10000000
    python -m benchmarks.scale formats 1000000

The catalogs are written as `prepare` writes them, from made-up captions of 60 characters; tars and their indexes are
sparse files of the right sizes. Each measurement is a process of its own, the import of torch included where it is
needed. CPU time says what the work is, on a machine with other work, too.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from itertools import product
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray

from pipeline.config.pipeline import PipelineConfig, load_pipeline
from pipeline.core.seeds import random_of
from pipeline.data.catalog import Catalog
from pipeline.data.catalog_columns import Column, Columns, caption_hash, key_hash, write_catalog
from pipeline.data.duplicates import same_image
from pipeline.data.order import GlobalOrder, ShardOrder
from pipeline.data.shard_table import ShardEntry
from pipeline.data.shards import PrepareIndex, SplitIndex, read_index, read_shards, write_index
from pipeline.orchestration.graph import stage_named
from pipeline.orchestration.run_directory import RunDirectory

CONFIG = Path(__file__).parent.parent / "configs" / "openmoji.yaml"
PER_SHARD = 10_000
IMAGE_BYTES = 100_000
CHOSEN = 512  # samples of generate
CAPTION = 60  # characters
_MARK = "measured: "


@click.group()
def main() -> None:
    """Measure one thing at several sizes of the data set."""


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("sizes", type=int, nargs=-1, required=True)
def starts(folder: Path, sizes: tuple[int, ...]) -> None:
    """Make data sets of SIZES samples below FOLDER, unless they are there, and measure the starts of stages."""
    print("| | samples | CPU s | wall s | MB read | files opened | peak MB |\n|---|---|---|---|---|---|---|")
    for samples in sizes:
        run = folder / f"n{samples}"
        if not (run / "prepare" / "_SUCCESS").is_file():
            _make(run, samples)
        for name in OPERATIONS:
            command = [sys.executable, "-m", "benchmarks.scale", "one", str(run), name]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            row = json.loads(done.stdout.split(_MARK)[1])
            figures = f"{row['cpu_s']:.2f} | {row['wall_s']:.2f} | {row['read_mb']:,.1f} | {row['files']:,}"
            print(f"| {name} | {samples:,} | {figures} | {row['peak_mb']:,.0f} |", flush=True)


@main.command()
@click.argument("samples", type=int)
def formats(samples: int) -> None:
    """512 captions at random of SAMPLES in three formats: what the catalog's is chosen by."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = np.sort(np.random.default_rng(0).choice(samples, CHOSEN, replace=False)).tolist()
    table = pa.table({"caption": _captions()})  # of a shard
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder, name) for name in ("catalog", "arrow", "parquet")}
        entry = write_catalog(files["catalog"], "train", partial(_parts, samples))
        parquet = pq.ParquetWriter(files["parquet"], table.schema, compression="zstd", write_page_checksum=True)
        with parquet, pa.ipc.new_file(files["arrow"], table.schema) as arrow:
            for _ in range(samples // PER_SHARD):
                parquet.write_table(table, row_group_size=PER_SHARD)
                arrow.write_table(table, max_chunksize=PER_SHARD)

        def flat() -> list[str]:
            counted: SplitIndex = {"samples": samples, "bytes": 0, "shards": []}
            index: PrepareIndex = {
                "image_size": 64,
                "splits": {"train": counted},
                "catalog": {"train": entry},
                "rejected": {"samples": 0, "reasons": {}},
                "conversions": {},
                "credit": None,
            }
            return Catalog(files["catalog"], "train", index).captions(rows)

        def in_arrow() -> list[str]:
            file = pa.ipc.open_file(pa.memory_map(str(files["arrow"])))
            return [file.get_batch(row // PER_SHARD)["caption"][row % PER_SHARD].as_py() for row in rows]

        def in_parquet() -> list[str]:
            file = pq.ParquetFile(files["parquet"], page_checksum_verification=True)
            return [file.read_row_group(row // PER_SHARD)["caption"][row % PER_SHARD].as_py() for row in rows]

        sizes = {
            flat: entry["bytes"]["captions"] + entry["bytes"]["captions.ends"],
            in_arrow: files["arrow"].stat().st_size,
            in_parquet: files["parquet"].stat().st_size,
        }
        for read, size in sizes.items():
            begun = time.process_time()
            assert len(read()) == CHOSEN
            print(
                f"{read.__name__}: {1e3 * (time.process_time() - begun):.1f} ms, {size / samples:.1f} bytes a caption"
            )


@main.command()
@click.argument("sizes", type=int, nargs=-1, required=True)
@click.option("--bits", default=3, show_default=True)
@click.option("--brute-force", is_flag=True, help="compare all pairs, too, and the results")
def duplicates(sizes: tuple[int, ...], bits: int, brute_force: bool) -> None:
    """Find near-duplicates among SIZES hashes: of chance, and distributed as those of images with flat colours."""
    print("| hashes | samples | CPU s | near-duplicates | peak MB |\n|---|---|---|---|---|")
    for samples, kind in product(sizes, ("chance", "images")):
        command = [sys.executable, "-m", "benchmarks.scale", "near", kind, str(samples), str(bits)]
        done = subprocess.run(command + ["--brute-force"] * brute_force, check=True, capture_output=True, text=True)
        print(done.stdout.split(_MARK)[1].strip(), flush=True)


@main.command()
@click.argument("kind")
@click.argument("samples", type=int)
@click.argument("bits", type=int)
@click.option("--brute-force", is_flag=True)
def near(kind: str, samples: int, bits: int, brute_force: bool) -> None:
    """One measurement of `duplicates`, in this process."""
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 1 << 64, samples, np.uint64) if kind == "chance" else _image_hashes(samples, rng)
    copies = rng.permutation(samples)[: samples // 20]  # planted: up to four bits differ
    sources = rng.integers(0, samples, len(copies))
    hashes[copies] = hashes[sources]
    for _ in range(4):
        hashes[copies] ^= np.uint64(1) << rng.integers(0, 64, len(copies), np.uint64)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "hashes.npy")
        np.save(path, np.stack([hashes, hashes], axis=1))
        begun = time.process_time()
        found = same_image([path], bits, np.empty(0, np.int64))
        seconds = time.process_time() - begun
    peak = _peak_kb() / 1e3
    if brute_force:
        assert found.tolist() == [n for n in range(samples) if _has_near(hashes[n], hashes[:n], bits)]
    print(f"{_MARK}| {kind} | {samples:,} | {seconds:,.1f} | {len(found):,} | {peak:,.0f} |")


def _has_near(own: np.uint64, others: NDArray[np.uint64], bits: int) -> bool:
    return bool((np.bitwise_count(others ^ own) <= bits).any())


def _image_hashes(samples: int, rng: np.random.Generator) -> NDArray[np.uint64]:
    """As `perceptual_hash` makes them (35 bits of luma, 2 x 14 of chroma) of photographs, drawings and flat images.

    Two fifths are photographs; two fifths drawings on white without colour, each like one of 20,000; a fifth is almost
    flat: any colour, and ten bits of luma that noise decides.
    """
    kinds = rng.choice(3, samples, p=[0.4, 0.4, 0.2])
    photographs = rng.integers(0, 1 << 35, samples, np.uint64)
    drawings = rng.integers(0, 1 << 35, 20_000, np.uint64)[rng.integers(0, 20_000, samples)]
    for bit in range(35):
        drawings ^= (rng.random(samples) < 0.08).astype(np.uint64) << np.uint64(bit)
    luma = np.choose(kinds, [photographs, drawings, rng.integers(0, 1 << 10, samples, np.uint64)])
    hashes = luma << np.uint64(29)
    for shift in (15, 1):
        levels = np.clip(np.rint(rng.normal(7, 2, samples)), 0, 14).astype(np.uint64)
        levels = np.choose(kinds, [levels, np.full(samples, 7, np.uint64), rng.integers(0, 15, samples, np.uint64)])
        hashes |= ((np.uint64(1) << levels) - np.uint64(1)) << np.uint64(shift)
    return hashes


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("name")
def one(run: Path, name: str) -> None:
    """One measurement, in this process."""
    opened = 0

    def count(event: str, _: object) -> None:
        nonlocal opened
        opened += event == "open"

    operation = OPERATIONS[name]
    before, imports = _bytes_read(), resource.getrusage(resource.RUSAGE_SELF)
    sys.addaudithook(count)
    begun = time.perf_counter()
    operation(run)
    wall = time.perf_counter() - begun
    used = resource.getrusage(resource.RUSAGE_SELF)
    row = {
        "cpu_s": used.ru_utime + used.ru_stime - imports.ru_utime - imports.ru_stime,
        "wall_s": wall,
        "read_mb": (_bytes_read() - before) / 1e6,
        "files": opened,
        "peak_mb": _peak_kb() / 1e3,
    }
    print(_MARK + json.dumps(row))


def _peak_kb() -> int:
    """Resident memory at most; `ru_maxrss` would count that of the process that started this one, too."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


def _bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def _config(run: Path) -> PipelineConfig:
    source = f"prepare.source={{kind: shapes, samples: {run.name[1:]}}}"
    overrides = [f"name=n{run.name}", f"runs={run.parent}", f"prepare.shard_size={PER_SHARD}", source]
    return load_pipeline(CONFIG, overrides)


def _make(run: Path, samples: int) -> None:
    """A finished prepare of so many samples, of which the images are holes in files."""
    config, runs, stage = _config(run), RunDirectory(run), stage_named("prepare")
    runs.open(config, "benchmarks.scale")
    runs.begin(config, stage)
    directory = run / "prepare"
    (directory / "train").mkdir(parents=True, exist_ok=True)
    shards: list[ShardEntry] = []
    header = _npy_header(PER_SHARD)
    for number in range(samples // PER_SHARD):
        name = f"train/{number:06d}.tar"
        shard: ShardEntry = {"name": name, "samples": PER_SHARD, "bytes": PER_SHARD * IMAGE_BYTES, "sha256": "0" * 64}
        shards.append(shard)
        index = (directory / name).with_suffix(".index.npy")
        index.write_bytes(header)
        os.truncate(index, len(header) + 24 * PER_SHARD)
        (directory / name).touch()
        os.truncate(directory / name, shard["bytes"])
    entry: SplitIndex = {"samples": samples, "bytes": samples * IMAGE_BYTES, "captions": samples, "shards": shards}
    empty: SplitIndex = {"samples": 0, "bytes": 0, "shards": []}
    catalog = {
        "train": write_catalog(directory, "train", partial(_parts, samples)),
        "val": write_catalog(directory, "val", lambda: iter(())),
    }
    made: PrepareIndex = {
        "image_size": 64,
        "splits": {"train": entry, "val": empty},
        "catalog": catalog,
        "rejected": {"samples": 0, "reasons": {}},
        "conversions": {},
        "credit": None,
    }
    write_index(directory, made)
    outputs = ("index.json", "train.shards", "val.shards", "train", "catalog")
    runs.finish(stage, dict.fromkeys(directory / name for name in outputs))


def _npy_header(rows: int) -> bytes:
    with tempfile.TemporaryFile() as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<i8", "fortran_order": False, "shape": (rows, 3)})
        file.seek(0)
        return file.read()


def _parts(samples: int) -> Iterator[Columns]:
    """The columns of each shard."""
    return (_Part(number) for number in range(samples // PER_SHARD))


class _Part(Mapping[str, Column]):
    """The columns of a shard. The hashes of all but the first are chance: they cost the same to look through."""

    def __init__(self, number: int) -> None:
        self._made: dict[str, Callable[[], Column]] = {
            "keys": lambda: np.frombuffer("".join(_keys(number)).encode(), np.uint8),
            "key_sizes": lambda: np.full(PER_SHARD, 9, np.int64),
            "key_hashes": lambda: _hashes(key_hash, _keys(0)) if not number else _chance(number),
            "captions": lambda: np.frombuffer("".join(_captions()).encode(), np.uint8),
            "caption_sizes": lambda: np.full(PER_SHARD, CAPTION, np.int64),
            "caption_hashes": lambda: _hashes(caption_hash, _captions()) if not number else _chance(-number),
            "caption_counts": lambda: np.ones(PER_SHARD, np.int64),
        }

    def __getitem__(self, name: str) -> Column:
        return self._made[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._made)

    def __len__(self) -> int:
        return len(self._made)


def _keys(number: int) -> list[str]:
    return [f"{row:09d}" for row in range(number * PER_SHARD, (number + 1) * PER_SHARD)]


@cache
def _captions() -> list[str]:
    rng = random_of("captions")
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(2_000)]
    return [" ".join(rng.choices(words, k=CAPTION // 2))[: CAPTION - 1] + "x" for _ in range(PER_SHARD)]


def _hashes(hashed: Callable[[str], int], texts: list[str]) -> NDArray[np.uint64]:
    return np.array([hashed(text) for text in texts], np.uint64)


def _chance(seed: int) -> NDArray[np.uint64]:
    return np.random.default_rng(abs(seed) * 2 + (seed < 0)).integers(0, 1 << 64, PER_SHARD, np.uint64)


def _choose(run: Path) -> None:
    from pipeline.config.generate import GenerateConfig
    from pipeline.sampling.prompts import check_against_training, sampled_rows

    catalog = Catalog(run / "prepare", "train")
    config = GenerateConfig(training_prompts=_captions()[:3], new_prompts=["a prompt that nobody wrote"])
    check_against_training(config, catalog)
    rows = sampled_rows(len(catalog), CHOSEN, seed=0)
    assert len(list(zip(catalog.keys(rows), catalog.captions(rows), strict=True))) == CHOSEN


def _evaluate(run: Path) -> None:
    from pipeline.evaluation.image_sets import prepared_images

    catalog = Catalog(run / "prepare", "train")
    assert len(catalog.rows_of(_keys(0)[:CHOSEN])) == CHOSEN
    others = np.random.default_rng(0).integers(0, len(catalog), CHOSEN)
    assert prepared_images(catalog, sorted({*range(20_000), *others.tolist()}))


def _text_tokenizer(run: Path) -> None:
    from pipeline.text_tokenizer import TextTokenizer
    from stages.text_tokenizer import statistics

    config, catalog = _config(run).text_tokenizer, Catalog(run / "prepare", "train")
    captions = list(catalog.caption_sample(config.max_captions, seed=0))
    assert statistics(TextTokenizer.train(captions, config), captions)["captions"] == len(captions)


def _order(run: Path) -> None:
    counts = read_shards(run / "prepare", "train", read_index(run / "prepare")).samples.tolist()
    for order in (ShardOrder(counts, seed=0), GlobalOrder(sum(counts), seed=0)):
        for position in (0, sum(counts) - 1, 7 * sum(counts) + 1):
            order.locate(np.arange(position, position + 256))


def _fresh(run: Path) -> None:
    assert RunDirectory(run).stale_reasons(_config(run), stage_named("prepare")) == []


def _index(run: Path) -> None:
    assert len(Catalog(run / "prepare", "train"))


OPERATIONS: dict[str, Callable[[Path], None]] = {
    "load the index and the catalog": _index,
    "is prepare up to date?": _fresh,
    "order at three positions": _order,
    "start of generate: check prompts, choose 512 captions": _choose,
    "start of evaluate: 20,000 images and 512 others": _evaluate,
    "text-tokenizer, of a million captions at most": _text_tokenizer,
}

if __name__ == "__main__":
    main()
