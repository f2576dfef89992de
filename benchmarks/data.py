"""How fast data is, beside what it has to keep up with. Prints tables; figures and what they mean: docs/data.md.

    python -m benchmarks.data stream       image stream beside plain webdataset pipelines; resume at 90 % of an epoch
    python -m benchmarks.data sampler      token sampler beside a training step of the demo's transformer; 10^9 samples
    python -m benchmarks.data tokenize     tokenize beside the encoder alone
    python -m benchmarks.data duplicates   search for equal keys and near pictures among 2^24 samples

Alternatives take turns, and each figure is the median of its rounds. `stream` also counts processor time, workers'
included, which other work on the machine disturbs less than the clock. It reads OpenMoji at 64 x 64, or the directory
of a finished `prepare`: python -m benchmarks.data stream --shards runs/x/prepare
"""

from __future__ import annotations

import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import webdataset
from torch.utils.data import DataLoader

from pipeline.config import load_config
from pipeline.data.config import PrepareConfig, TokenizeConfig
from pipeline.data.duplicates import same_key, same_picture
from pipeline.data.prepare import prepare
from pipeline.data.sampler import TokenSampler
from pipeline.data.shards import read_samples
from pipeline.data.stream import ImageStream
from pipeline.data.tokenizing import Encoders, all_shards, tokenize_shard
from pipeline.data.tokens import Level, token_dtype
from pipeline.files import write_json
from pipeline.graph import PipelineConfig
from pipeline.image_tokenizer.base import build
from pipeline.transformer.layout import Layout
from pipeline.transformer.model import Transformer
from pipeline.transformer.objective import JointObjective

BATCH = 64
ROUNDS = 3
DEMO = Path(__file__).parents[1] / "configs" / "openmoji.yaml"


def shards(folder: Path, image_size: int) -> Path:
    values = {"source": {"kind": "openmoji"}, "image_size": image_size, "shard_size": 256, "validation_fraction": 0.02}
    prepare(folder, PrepareConfig.model_validate(values), seed=0)
    return folder


# --- stream ------------------------------------------------------------------------------------------------------


def to_pixels(sample: dict[str, Any]) -> torch.Tensor:
    """webdataset's own decoder to an RGB array, then the layout that the model wants."""
    return torch.from_numpy(sample["png"]).permute(2, 0, 1)


def plain_webdataset(prepared: Path, workers: int) -> Iterator[torch.Tensor]:
    """As its documentation has it: shuffle shards, shuffle samples, decode, batch in the worker."""
    urls = sorted(str(path) for path in (prepared / "train").glob("*.tar"))
    data = webdataset.WebDataset(urls, shardshuffle=100, nodesplitter=webdataset.split_by_node).shuffle(1000)
    data = data.decode("rgb8").map(to_pixels).batched(BATCH, collation_fn=torch.stack, partial=False)
    return iter(DataLoader(data.repeat(), batch_size=None, num_workers=workers))


def our_stream(prepared: Path, threads: int, cache_bytes: int) -> Iterator[Any]:
    return ImageStream(prepared, "train", 0, threads=threads, cache_bytes=cache_bytes).batches(0, BATCH)


def cpu_seconds() -> float:
    """Processor time of this process and of its children that live."""
    here = psutil.Process()
    times = [process.cpu_times() for process in (here, *here.children(recursive=True))]
    return float(sum(spent.user + spent.system for spent in times))


def rates_of(batches: Iterator[Any], warm: int, count: int) -> tuple[float, float]:
    """Pictures a second, and pictures a second of processor time."""
    for _ in islice(batches, warm):
        pass
    started, cpu = time.perf_counter(), cpu_seconds()
    for _ in islice(batches, count):
        pass
    wall = time.perf_counter() - started
    return count * BATCH / wall, count * BATCH / (cpu_seconds() - cpu)


def stream(given: str | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(given) if given else shards(Path(folder), 64)
        epoch = len(ImageStream(prepared, "train", 0)) // BATCH
        pipelines: dict[str, Callable[[], Iterator[Any]]] = {
            "webdataset, no worker": lambda: plain_webdataset(prepared, 0),
            "webdataset, 1 worker": lambda: plain_webdataset(prepared, 1),
            "webdataset, 2 workers": lambda: plain_webdataset(prepared, 2),
            "stream, 1 thread, no cache": lambda: our_stream(prepared, 1, 0),
            "stream, 2 threads, no cache": lambda: our_stream(prepared, 2, 0),
            "stream, default (cache)": lambda: our_stream(prepared, 1, 512 << 20),
        }
        rates: dict[str, list[tuple[float, float]]] = {name: [] for name in pipelines}
        for _ in range(ROUNDS):
            for name, make in pipelines.items():
                batches = make()
                # The first epoch fills caches (the system's, and ours where it is on).
                rates[name].append(rates_of(batches, epoch + 2 if "cache)" in name else 10, 40))
                del batches
        for name, values in rates.items():
            wall, cpu = (statistics.median(column) for column in zip(*values, strict=True))
            print(f"{name:<32}{wall:>10,.0f} pictures/s{cpu:>12,.0f} pictures a processor second")
        resume(prepared)


def resume(prepared: Path) -> None:
    image_stream = ImageStream(prepared, "train", 0, cache_bytes=0)
    whole, late = [], []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        for _ in islice(image_stream.batches(0, BATCH), len(image_stream) // BATCH):
            pass
        whole.append(time.perf_counter() - started)
        started = time.perf_counter()
        next(ImageStream(prepared, "train", 0, cache_bytes=0).batches(int(0.9 * len(image_stream)), BATCH))
        late.append(time.perf_counter() - started)
    epoch_s, late_s = statistics.median(whole), statistics.median(late)
    print(f"an epoch {epoch_s:.3f} s; first batch at 90 % of it {late_s:.4f} s: {late_s / epoch_s:.1%}")


# --- sampler -----------------------------------------------------------------------------------------------------


def hollow_arrays(folder: Path, shard_count: int, samples: int, text: int, side: int) -> Path:
    """Token arrays of zeros that take no room on disk, to see what a size costs."""
    entries = []
    for number in range(shard_count):
        names = {"text": f"train/{number:06d}.text.npy", "codes": [f"train/{number:06d}.codes.0.npy"]}
        for name, shape in ((names["text"], (samples, text)), (names["codes"][0], (samples, 1, side * side))):
            path = folder / str(name)
            path.parent.mkdir(exist_ok=True)
            np.lib.format.open_memmap(path, "w+", token_dtype(1024), shape)
        entries.append({**names, "keys": "", "samples": samples, "crops": 1, "sha256": {}})
    index = {
        "levels": [{"height": side, "width": side, "codebook_size": 1024}],
        "text_length": text,
        "text_vocab_size": 2048,
        "splits": {"train": {"samples": samples * shard_count, "shards": entries}},
    }
    write_json(folder / "index.json", index)
    return folder


def sampler() -> None:
    config = load_config(PipelineConfig, DEMO)
    text, side = config.text_tokenizer.text_length, 8
    with tempfile.TemporaryDirectory() as folder:
        small = hollow_arrays(Path(folder), 8, 256, text, side)
        batch = config.transformer.training.batch_size
        step = training_step(config, text, side, batch)
        rates = []
        for _ in range(ROUNDS):
            batches = TokenSampler(small, "train", 0).batches(0, batch)
            next(batches)
            started = time.perf_counter()
            for _ in islice(batches, 300):
                pass
            rates.append(300 * batch / (time.perf_counter() - started))
        given = statistics.median(rates)
        print(f"sampler {given:,.0f} samples/s; training step uses {step:,.0f} samples/s: {given / step:.0f} x")
    with tempfile.TemporaryDirectory() as folder:
        hollow_arrays(Path(folder), 1_000, 1_000_000, text, side)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for position in (0, 10**9, 10**9 - 17, 7 * 10**11):
            started = time.perf_counter()
            samples = TokenSampler(Path(folder), "train", 0)
            opened = time.perf_counter()
            batches = samples.batches(position, BATCH)
            next(batches)
            first = time.perf_counter()
            for _ in islice(batches, 100):
                pass
            after = 100 * BATCH / (time.perf_counter() - first)
            print(
                f"10^9 samples in 1,000 shards, from {position:>15,}: index {opened - started:.4f} s, "
                f"first batch {first - opened:.4f} s, then {after:,.0f} samples/s"
            )
        print(f"memory: {(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024:.1f} MB more than before")


def training_step(config: PipelineConfig, text: int, side: int, batch: int) -> float:
    """Samples/s of forward and backward of the demo's transformer."""
    layout = Layout.of(text, 2048, [(side, side, 1024)])
    objective = JointObjective(Transformer(layout, config.transformer), config.transformer)
    inputs = {"text": torch.ones(batch, text).long(), "codes": torch.zeros(batch, side * side).long()}
    times = []
    for _ in range(ROUNDS + 1):
        started = time.perf_counter()
        loss, _ = objective(inputs, 0)
        loss.backward()
        times.append(time.perf_counter() - started)
    return batch / statistics.median(times[1:])


# --- tokenize ----------------------------------------------------------------------------------------------------


def tokenize() -> None:
    config = load_config(PipelineConfig, DEMO)
    size = config.prepare.image_size
    tokenizer = build(config.image_tokenizer.model, size).eval()
    levels = [Level(*level) for level in tokenizer.levels]
    hashes = {"image-tokenizer": "", "text-tokenizer": ""}
    encoders = Encoders(tokenizer.encode, lambda captions: np.ones((len(captions), 8), np.int64), levels, 8, 8, hashes)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        prepared = shards(Path(folder) / "prepare", size)
        pictures = torch.from_numpy(np.stack([np.asarray(s.image) for s in read_samples(prepared, "train")]))
        batches = torch.split(pictures.permute(0, 3, 1, 2).float().div(255).contiguous(), BATCH)
        alone, whole = [], []
        for number in range(ROUNDS):
            started = time.perf_counter()
            for batch in batches:
                tokenizer.encode(batch)
            alone.append(len(pictures) / (time.perf_counter() - started))
            started = time.perf_counter()
            for split, shard in all_shards(prepared):
                if split == "train":
                    out = Path(folder) / f"tokens{number}"
                    tokenize_shard(out, prepared, split, shard, encoders, TokenizeConfig(batch_size=BATCH), 0)
            whole.append(len(pictures) / (time.perf_counter() - started))
        encode, all_of_it = statistics.median(alone), statistics.median(whole)
        print(f"encoder alone {encode:,.0f} pictures/s; tokenize {all_of_it:,.0f}: {all_of_it / encode:.2f} x")


# --- duplicates --------------------------------------------------------------------------------------------------


def duplicates() -> None:
    count, files = 1 << 24, 1 << 10
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{number}.npy" for number in range(files)]
        for path in paths:
            np.save(path, rng.integers(0, 2**64, (count // files, 2), dtype=np.uint64))
        for name, search in (
            ("equal keys, one slice", lambda: same_key(paths, [count // files] * files)),
            ("equal keys, 8 slices", lambda: same_key(paths, [count // files] * files, count // 8)),
            ("near pictures, 3 bits", lambda: same_picture(paths, 3, np.empty(0, np.int64))),
        ):
            started = time.perf_counter()
            found = search()
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            seconds = time.perf_counter() - started
            print(f"{count:,} samples, {name:<24}{seconds:6.1f} s, peak so far {peak:.1f} GB, {len(found)} found")


if __name__ == "__main__":
    arguments = sys.argv[1:]
    at = arguments.index("--shards") if "--shards" in arguments else len(arguments)
    for name in arguments[:at] or ["stream", "sampler", "tokenize", "duplicates"]:
        if name == "stream":
            stream(arguments[at + 1] if at < len(arguments) else None)
        else:
            {"sampler": sampler, "tokenize": tokenize, "duplicates": duplicates}[name]()
