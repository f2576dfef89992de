"""Image streams and token samplers that read from an object store, beside the same from the disk. Prints tables.

    python -m benchmarks.remote_data FOLDER [--only images] [--delay-ms 50]

Data is made in FOLDER (some 0.2 GB). The store is a process of its own on loopback (`slow_store.py`), read through s3fs
as any S3. Every round reads from the first sample on with an empty cache, and local files that are not in the page
cache; local and remote take turns, and each metric is the median of its rounds. docs/data.md has the results.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.data import drop_from_page_cache, table
from benchmarks.hollow_arrays import hollow_arrays
from pipeline.config.store import StoreConfig
from pipeline.core import elsewhere
from pipeline.core.elsewhere import Elsewhere, FilesElsewhere
from pipeline.data import remote_file, stored_image
from pipeline.data.remote_file import configure
from pipeline.data.sampler import TokenSampler
from pipeline.data.shards import PrepareIndex, Sample, open_shard, read_shards, write_index
from pipeline.data.stream import ImageStream
from pipeline.data.token_parts import part_file
from pipeline.data.tokens import read_token_index, split_parts

BATCH, ROUNDS = 64, 3
SHARDS, IMAGES, SIDE = 16, 250, 256  # a shard of 8 MB
TOKEN_SHARDS, TOKEN_SAMPLES = 50, 10_000
STEP_S = 0.06
STEPS = 150  # of a training on tokens: its first epoch would take minutes
BUCKET = "data"


# --- the store ---------------------------------------------------------------------------------------------------


def start_store(folder: Path, delay_ms: float) -> subprocess.Popen[bytes]:
    """The store, which the environment names from now on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.slow_store", str(folder), str(port), str(delay_ms)])
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ.update({"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", **keys})
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return process
        except OSError:
            time.sleep(0.1)


# --- the data ----------------------------------------------------------------------------------------------------


def make_images(directory: Path) -> None:
    """A split "train" of JPEGs that look like photographs to their codec: noise of low frequencies."""
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (200, SIDE // 8, SIDE // 8, 3), np.uint8)
    smooth = [stored_image.Image.fromarray(one).resize((SIDE, SIDE), 3) for one in coarse]
    encoded = [stored_image.encode(image, "jpeg", 95) for image in smooth]
    entries: list[Any] = []
    for shard in range(SHARDS):
        name = f"train/{shard:06d}.tar"
        with open_shard(directory / name) as writer:
            for row in range(IMAGES):
                writer.add(Sample(f"{shard:06d}-{row:06d}", encoded[int(random.integers(200))], "an image", {}))
        entries.append({"name": name, "samples": IMAGES, "bytes": writer.bytes, "sha256": writer.sha256})
    total = sum(entry["bytes"] for entry in entries)
    index: PrepareIndex = {
        "image_size": SIDE,
        "storage": "jpeg",
        "splits": {"train": {"samples": SHARDS * IMAGES, "bytes": total, "shards": entries}},
        "rejected": {"samples": 0, "reasons": {}},
        "conversions": {},
        "credit": None,
    }
    write_index(directory, index)


def move(here: Path, there: Path, store: Path, suffix: str, files: list[tuple[str, int, str]]) -> None:
    """The same directory with its large files in the store alone."""
    shutil.copytree(here, there, ignore=shutil.ignore_patterns(f"*{suffix}"))
    for name, _, content in files:
        to = store / BUCKET / here.name / elsewhere.object_name(name, content)
        to.parent.mkdir(parents=True, exist_ok=True)
        os.link(here / name, to)
    train = FilesElsewhere(files=len(files), bytes=sum(size for _, size, _ in files))
    elsewhere.write(there, Elsewhere(f"s3://{BUCKET}/{here.name}", suffix, {"train": train}))


def make_all(folder: Path) -> None:
    """Both kinds of data, here and there."""
    here, there, store = folder / "here", folder / "there", folder / "store"
    make_images(here / "images")
    tars = [(shard.name, shard.bytes, shard.sha256) for shard in read_shards(here / "images", "train")]
    move(here / "images", there / "images", store, ".tar", tars)
    hollow_arrays(here / "tokens", TOKEN_SHARDS, TOKEN_SAMPLES, text=8, side=8)
    parts = split_parts(here / "tokens", "train", read_token_index(here / "tokens"))
    move(here / "tokens", there / "tokens", store, ".tokens", [part_file("train", records) for records in parts])


# --- measurements ------------------------------------------------------------------------------------------------


def images(directory: Path) -> Iterator[Any]:
    return ImageStream(directory / "images", "train", 0, cache_bytes=0).batches(0, BATCH)


def tokens(directory: Path) -> Iterator[Any]:
    return TokenSampler(directory / "tokens", "train", 0).batches(0, BATCH)


def seconds(batches: Iterator[Any], count: int, step_s: float) -> tuple[float, float, float]:
    """Of `count` batches, each followed by a step of `step_s`; of the first batch; and of this process's processor."""
    started, first_s, processor_s = time.perf_counter(), 0.0, time.process_time()
    for number, _ in enumerate(islice(batches, count)):
        first_s = first_s or time.perf_counter() - started
        if step_s:
            time.sleep(step_s)
        assert number < count
    return time.perf_counter() - started, first_s, time.process_time() - processor_s


def compare(folder: Path, what: str, make: Callable[[Path], Iterator[Any]], count: int, step_s: float) -> list[str]:
    """A row of the table."""
    found: dict[str, list[tuple[float, float, float]]] = {"here": [], "there": []}
    for number in range(ROUNDS):
        for place, times in found.items():
            shutil.rmtree(folder / "cache", ignore_errors=True)
            configure(StoreConfig(cache=folder / "cache" / str(number)))
            drop_from_page_cache(folder / "here")
            times.append(seconds(make(folder / place), count, step_s))
    rate = {place: count * BATCH / statistics.median(whole for whole, _, _ in times) for place, times in found.items()}
    first = {place: statistics.median(first for _, first, _ in times) for place, times in found.items()}
    work = {place: count * BATCH / statistics.median(cpu for _, _, cpu in times) for place, times in found.items()}
    ratios = [here[0] / there[0] for here, there in zip(found["here"], found["there"], strict=True)]
    return [
        what,
        f"{rate['here']:,.0f}",
        f"{rate['there']:,.0f}",
        f"{statistics.median(ratios):.2f} ({min(ratios):.2f} – {max(ratios):.2f})",
        *([f"{work['here']:,.0f}", f"{work['there']:,.0f}"] if not step_s else ["", ""]),
        f"{first['here']:.2f} s",
        f"{first['there']:.2f} s",
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", choices=["images", "tokens"])
    parser.add_argument("--delay-ms", type=float, default=50.0)
    arguments = parser.parse_args()
    if not (arguments.folder / "there").exists():
        make_all(arguments.folder)
    store = start_store(arguments.folder / "store", arguments.delay_ms)
    try:
        epoch, rows = SHARDS * IMAGES // BATCH, TOKEN_SHARDS * TOKEN_SAMPLES // BATCH
        step = f"steps of {STEP_S * 1000:.0f} ms"
        table(
            [
                "first epoch, nothing cached",
                "local/s",
                "store/s",
                "ratio",
                "local/CPU s",
                "store/CPU s",
                "first batch, local",
                "store",
            ],
            [
                compare(arguments.folder, name, make, count, step_s)
                for kind, name, make, count, step_s in (
                    ("images", "images, nothing but the stream", images, epoch, 0.0),
                    ("images", f"images, {step}", images, epoch, STEP_S),
                    ("tokens", "token rows, nothing but the sampler", tokens, rows, 0.0),
                    ("tokens", f"token rows, {step}, first {STEPS}", tokens, STEPS, STEP_S),
                )
                if arguments.only in (None, kind)
            ],
        )
        print(f"blocks of {remote_file.BLOCK_BYTES >> 20} MiB, {StoreConfig().connections} connections")
    finally:
        store.kill()


if __name__ == "__main__":
    main()
