"""What the starts of stages cost when the data set grows: time, bytes read, files opened, peak memory.

    python -m benchmarks.scale starts runs/scale 100000 1000000 10000000
    python -m benchmarks.scale formats 1000000

The catalogs are written as `prepare` writes them, from made-up captions of 60 characters; tars are sparse files of the
right sizes with one image, which every sample is; token arrays are zeros. Each measurement is a process of its own, the
import of torch included where it is needed. CPU time says what the work is, on a machine with other work, too.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.config.pipeline import PipelineConfig, load_pipeline
from pipeline.core.seeds import random_of
from pipeline.data import png
from pipeline.data.catalog import Catalog
from pipeline.data.catalog_columns import Column, Columns, caption_hash, key_hash, write_catalog
from pipeline.data.order import GlobalOrder, ShardOrder
from pipeline.data.shard_table import ShardEntry
from pipeline.data.shards import PrepareIndex, Shards, SplitIndex, read_index, read_shards, write_index
from pipeline.orchestration.graph import stage_named
from pipeline.orchestration.run_directory import RunDirectory

CONFIG = Path(__file__).parent.parent / "configs" / "openmoji.yaml"
PER_SHARD = 10_000
SIDE, TEXT, CODES = 64, 8, 8  # of an image, a caption in tokens, a grid of codes
_TAR_BLOCK = 512
IMAGE_BYTES = 100_000
CHOSEN, SHOWN, BATCH = 512, 64, 256  # samples of generate, of the report, of a step
CAPTION = 60  # characters
MARK = "measured: "


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
            row = json.loads(done.stdout.split(MARK)[1])
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
        "peak_mb": peak_kb() / 1e3,
    }
    print(MARK + json.dumps(row))


def peak_kb() -> int:
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
    from benchmarks.hollow_arrays import hollow_arrays

    config, runs, stage = _config(run), RunDirectory(run), stage_named("prepare")
    runs.open(config, "benchmarks.scale")
    runs.begin(config, stage)
    directory = run / "prepare"
    (directory / "train").mkdir(parents=True, exist_ok=True)
    shards: list[ShardEntry] = []
    one = png.encode(Image.new("RGB", (SIDE, SIDE), "white"))
    row = np.array([[_TAR_BLOCK, len(one), zlib.crc32(one)]], np.int64)
    np.save(run / "index.npy", row.repeat(PER_SHARD, axis=0))
    for number in range(samples // PER_SHARD):
        name = f"train/{number:06d}.tar"
        shard: ShardEntry = {"name": name, "samples": PER_SHARD, "bytes": PER_SHARD * IMAGE_BYTES, "sha256": "0" * 64}
        shards.append(shard)
        (directory / name).with_suffix(".index.npy").hardlink_to(run / "index.npy")  # of every shard: the same image
        (directory / name).write_bytes(bytes(_TAR_BLOCK) + one)
        os.truncate(directory / name, shard["bytes"])
    entry: SplitIndex = {"samples": samples, "bytes": samples * IMAGE_BYTES, "captions": samples, "shards": shards}
    empty: SplitIndex = {"samples": 0, "bytes": 0, "shards": []}
    catalog = {
        "train": write_catalog(directory, "train", partial(_parts, samples)),
        "val": write_catalog(directory, "val", lambda: iter(())),
    }
    made: PrepareIndex = {
        "image_size": SIDE,
        "splits": {"train": entry, "val": empty},
        "catalog": catalog,
        "rejected": {"samples": 0, "reasons": {}},
        "conversions": {},
        "credit": None,
    }
    write_index(directory, made)
    outputs = ("index.json", "train.shards", "val.shards", "train", "catalog")
    runs.finish(stage, dict.fromkeys(directory / name for name in outputs))
    hollow_arrays(run / "tokenize", samples // PER_SHARD, PER_SHARD, TEXT, CODES)


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


def _prepare(run: Path) -> None:
    from pipeline.config.prepare import PrepareConfig
    from pipeline.data.sources import open_source

    source = {"kind": "webdataset", "urls": f"{run}/prepare/train/*.tar"}
    config = PrepareConfig.model_validate({"source": source, "image_size": SIDE})
    assert len(list(open_source(config.all_sources[0], SIDE).parts(PER_SHARD))) == len(_shards(run))


def _shards(run: Path) -> Shards:
    return read_shards(run / "prepare", "train", read_index(run / "prepare"))


def _stream(run: Path) -> None:
    from pipeline.data.stream import ImageStream

    stream = ImageStream(run / "prepare", "train", seed=0)
    for position in (0, 7 * len(stream) + 1):
        batches = stream.batches(position, BATCH)
        assert len(next(batches)["images"]) == BATCH
        batches.close()


def _tokenize(run: Path) -> None:
    import torch

    from pipeline.config.tokenize import TokenizeConfig
    from pipeline.core.level import Level
    from pipeline.data.token_parts import token_parts
    from pipeline.data.tokenize_shards import Encoders, TokenizeJob

    encoders = Encoders(lambda _: [], lambda _: torch.empty(0), [Level(CODES, CODES, 1024)], TEXT, 2048, {})
    job = TokenizeJob(run / "none", run / "prepare", encoders, TokenizeConfig(), seed=0)
    parts = token_parts(job.prepare_dir)
    assert not any(job.writer(part).records.size for part in parts)


def _transformer(run: Path) -> None:
    from pipeline.data.sampler import TokenSampler

    sampler = TokenSampler(run / "tokenize", "train", seed=0)
    for position in (0, 7 * len(sampler) + 1):
        batches = sampler.batches(position, BATCH)
        assert len(next(batches)["codes"]) == BATCH
        batches.close()


def _report(run: Path) -> None:
    catalog = Catalog(run / "prepare", "train")
    rows = catalog.rows_of(_keys(0)[:SHOWN]).values()
    assert len([sample.image for sample in catalog.samples(sorted(rows))]) == SHOWN


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
    "start of prepare: list the tars": _prepare,
    "start of image-tokenizer: two batches of 256": _stream,
    "start of tokenize: what is to be done": _tokenize,
    "start of transformer: two batches of 256": _transformer,
    "report: find 64 keys, read their images": _report,
}

if __name__ == "__main__":
    main()
