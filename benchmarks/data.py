"""How fast data is, beside what it has to keep up with. Prints tables; metrics and what they mean: docs/data.md.

    python -m benchmarks.data stream [PREPARE...]   image stream beside webdataset pipelines; resume at 90 % of an epoch
    python -m benchmarks.data sampler               token sampler beside training steps of small models; 10^9 samples
    python -m benchmarks.data loader                steps of 60 ms with batches that take 50 ms, beside the bare step
    python -m benchmarks.data tokenize              tokenize beside the encoder alone
    python -m benchmarks.data duplicates            search for equal keys and near images among 2^24 samples

Alternatives take turns, and each metric is the median of its rounds. `stream` reads OpenMoji at 64 x 64, or the
directories of finished `prepare` stages (runs/x/prepare); it also counts processor time, workers' included, which
other work on the machine disturbs less than the clock.
"""

from __future__ import annotations

import os
import resource
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import webdataset
from torch.utils.data import DataLoader

from benchmarks.hollow_arrays import hollow_arrays
from pipeline.config.base import load_config
from pipeline.config.pipeline import PipelineConfig
from pipeline.config.prepare import PrepareConfig
from pipeline.config.tokenize import TokenizeConfig
from pipeline.config.transformer import TransformerConfig
from pipeline.core.image_size import height_width
from pipeline.data import stored_image
from pipeline.data.duplicates import same_image, same_key
from pipeline.data.prepare import prepare
from pipeline.data.sampler import TokenSampler
from pipeline.data.shards import read_samples
from pipeline.data.stream import ImageStream
from pipeline.data.token_parts import token_parts
from pipeline.data.tokenize_shards import Encoders, TokenizeJob, tokenize_shards
from pipeline.image_tokenizer.base import build
from pipeline.text_tokenizer import TextTokenizer
from pipeline.transformer.layout import Layout
from pipeline.transformer.model import Transformer
from pipeline.transformer.objective import JointObjective

BATCH = 64
ROUNDS = 3
STEADY_BATCHES, OF_LARGE = 60, 20  # of images below and from 128 pixels on
DEMO = Path(__file__).parents[1] / "configs" / "openmoji.yaml"


def table(header: list[str], rows: list[list[str]]) -> None:
    """A Markdown table."""
    print()
    for cells in (header, ["---"] * len(header), *rows):
        print("|", " | ".join(cells), "|")
    print(flush=True)


def shards(folder: Path, image_size: int) -> Path:
    """OpenMoji as image shards of `image_size` pixels, made in `folder`."""
    values = {"source": {"kind": "openmoji"}, "image_size": image_size, "shard_size": 256, "validation_fraction": 0.02}
    prepare(folder, PrepareConfig.model_validate(values), seed=0)
    return folder


# --- stream ------------------------------------------------------------------------------------------------------


def to_pixels(sample: dict[str, Any]) -> torch.Tensor:
    """webdataset's own decoder to an RGB array, then the layout that the model wants."""
    return torch.from_numpy(_image(sample)).permute(2, 0, 1)


def to_pixels_fast(sample: dict[str, Any]) -> torch.Tensor:
    """Our decoder inside of webdataset's pipeline."""
    return torch.from_numpy(stored_image.decode(_image(sample)))


def _image(sample: dict[str, Any]) -> Any:
    return next(sample[extension] for extension in ("png", "jpg", "webp") if extension in sample)


def plain_webdataset(prepared: Path, workers: int, fast: bool = False) -> Iterator[torch.Tensor]:
    """The pipeline of its documentation: shuffle shards, shuffle samples, decode, batch in the worker."""
    urls = sorted(str(path) for path in (prepared / "train").glob("*.tar"))
    data = webdataset.WebDataset(urls, shardshuffle=100, nodesplitter=webdataset.split_by_node).shuffle(1000)
    data = data.map(to_pixels_fast) if fast else data.decode("rgb8").map(to_pixels)
    data = data.batched(BATCH, collation_fn=torch.stack, partial=False)
    return iter(DataLoader(data.repeat(), batch_size=None, num_workers=workers))


def our_stream(prepared: Path, threads: int, cache_bytes: int) -> Iterator[Any]:
    """The image stream of this package."""
    return ImageStream(prepared, "train", 0, threads=threads, cache_bytes=cache_bytes).batches(0, BATCH)


PIPELINES: dict[str, Callable[[Path], Iterator[Any]]] = {
    "webdataset, no worker": lambda prepared: plain_webdataset(prepared, 0),
    "webdataset, 1 worker": lambda prepared: plain_webdataset(prepared, 1),
    "webdataset, 2 workers": lambda prepared: plain_webdataset(prepared, 2),
    "webdataset, 2 workers, our decoder": lambda prepared: plain_webdataset(prepared, 2, fast=True),
    "stream, 1 thread, no cache": lambda prepared: our_stream(prepared, 1, 0),
    "stream, 2 threads, no cache": lambda prepared: our_stream(prepared, 2, 0),
    "stream as it comes (decoded once, then cached)": lambda prepared: our_stream(prepared, 1, 512 << 20),
}


def cpu_seconds() -> float:
    """Processor time of this process and of its children that live."""
    here = psutil.Process()
    times = [process.cpu_times() for process in (here, *here.children(recursive=True))]
    return float(sum(spent.user + spent.system for spent in times))


def drop_from_page_cache(folder: Path) -> None:
    """Make the next read of every file of the folder come from the disk."""
    os.sync()
    for path in folder.rglob("*.*"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def rates_of(
    prepared: Path, make: Callable[[Path], Iterator[Any]], epoch: int, steady: int
) -> tuple[float, float, float]:
    """Seconds of the first epoch (cold files, start-up included); then images per second, and per processor second."""
    drop_from_page_cache(prepared / "train")
    started = time.perf_counter()
    batches = make(prepared)
    for _ in islice(batches, epoch):
        pass
    cold = time.perf_counter() - started
    started, cpu = time.perf_counter(), cpu_seconds()
    for _ in islice(batches, steady):
        pass
    wall, cpu = time.perf_counter() - started, cpu_seconds() - cpu
    del batches
    return cold, steady * BATCH / wall, steady * BATCH / cpu


def stream(given: list[str]) -> None:
    """The tables of `stream`; `given`: directories of finished `prepare` stages."""
    warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # of webdataset's decoder
    with tempfile.TemporaryDirectory() as folder:
        for prepared in [Path(path) for path in given] or [shards(Path(folder), 64)]:
            whole = ImageStream(prepared, "train", 0)
            print(f"\n{len(whole):,} images of {whole.image_size} px in {len(whole.shards)} shards, batches of {BATCH}")
            found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in PIPELINES}
            steady = STEADY_BATCHES if min(height_width(whole.image_size)) < 128 else OF_LARGE
            for _ in range(ROUNDS):
                for name, make in PIPELINES.items():
                    found[name].append(rates_of(prepared, make, len(whole) // BATCH, steady))
            medians = {
                name: [statistics.median(column) for column in zip(*values, strict=True)]
                for name, values in found.items()
            }
            rows = [[name, f"{v[0]:.2f} s", f"{v[1]:,.0f}", f"{v[2]:,.0f}"] for name, v in medians.items()]
            table(["", "first epoch, cold", "then images/s", "images per processor second"], rows)
            for column, of in ((1, "second"), (2, "processor second")):
                compare({name: values[column] for name, values in medians.items()}, of)
            resume(prepared)


def compare(rate: dict[str, float], of: str) -> None:
    """How many times as many images a second, or a processor second, the stream reads."""
    ours, theirs = ([name for name in rate if name.startswith(s)] for s in ("stream", "webdataset"))
    mine, plain = max(rate[name] for name in ours[:2]), max(rate[name] for name in theirs[:3])
    print(f"images per {of}:")
    print(f"1 thread / 1 worker: {rate[ours[0]] / rate[theirs[1]]:.2f} x")
    print(f"2 threads / 2 workers: {rate[ours[1]] / rate[theirs[2]]:.2f} x")
    print(f"best without cache / best plain webdataset: {mine / plain:.2f} x")
    print(f"best without cache / webdataset with our decoder: {mine / rate[theirs[3]]:.2f} x")


def resume(prepared: Path) -> None:
    """How long the first sample, and the first batch, take at 90 % of an epoch, beside the whole epoch; warm files."""

    def seconds(position: int, batch: int, count: int) -> float:
        started = time.perf_counter()
        batches = ImageStream(prepared, "train", 0, cache_bytes=0).batches(position, batch)
        for _ in islice(batches, count):
            pass
        taken = time.perf_counter() - started
        batches.close()
        return taken

    samples = len(ImageStream(prepared, "train", 0))
    rounds = [
        (seconds(0, BATCH, samples // BATCH), seconds(samples * 9 // 10, 1, 1), seconds(samples * 9 // 10, BATCH, 1))
        for _ in range(3 * ROUNDS)
    ]
    epoch, sample, batch = (statistics.median(column) for column in zip(*rounds, strict=True))
    rows = [["the whole epoch", f"{epoch * 1e3:,.1f} ms", ""]]
    for name, taken in (("first sample", sample), (f"first batch of {BATCH}", batch)):
        rows.append([f"{name} at 90 %", f"{taken * 1e3:,.1f} ms", f"{taken / epoch:.1%}"])
    table(["from nothing (index, threads, files) to", "", "of the epoch"], rows)


# --- sampler -----------------------------------------------------------------------------------------------------


def sampler() -> None:
    """The tables of `sampler`."""
    config = load_config(PipelineConfig, DEMO)
    demo = config.transformer
    models = {"the demo's, 2 layers of 256, 8 + 64 positions": (demo, 8, 8)}
    larger = demo.model_copy(update={"layers": 6, "heads": 8})
    models["6 layers of 256, 32 + 256 positions"] = (larger, 32, 16)
    rows = []
    for name, (transformer, text, side) in models.items():
        with tempfile.TemporaryDirectory() as folder:
            arrays = hollow_arrays(Path(folder) / "arrays", 64, 10_000, text, side)
            for batch in (8, 32):
                used, given = training_samples_s(transformer, text, side, batch), sampled_s(arrays, batch)
                rows.append([name, str(batch), f"{used:,.0f}", f"{given:,.0f}", f"{given / used:.0f} x"])
    table(["transformer", "batch", "training uses samples a CPU second", "the sampler gives", ""], rows)
    with tempfile.TemporaryDirectory() as folder:
        billion(hollow_arrays(Path(folder) / "arrays", 1_000, 1_000_000, 8, 8))


def sampled_s(arrays: Path, batch: int) -> float:
    """Samples of the token sampler a processor second."""
    rates = []
    batches = TokenSampler(arrays, "train", 0).batches(0, batch)
    for _ in islice(batches, 100):  # opens all shards
        pass
    for _ in range(ROUNDS):
        started = time.process_time()
        for _ in islice(batches, 300):
            pass
        rates.append(300 * batch / (time.process_time() - started))
    return statistics.median(rates)


def training_samples_s(config: TransformerConfig, text: int, side: int, batch: int) -> float:
    """Samples a processor second of forward, backward and AdamW, without an engine around them."""
    layout = Layout.of(text, 2048, [(side, side, 1024)])
    objective = JointObjective(Transformer(layout, config), config)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-4)
    inputs = {"text": torch.ones(batch, text).long(), "codes": torch.zeros(batch, side * side).long()}
    times = []
    for _ in range(ROUNDS + 1):
        started = time.process_time()
        loss, _ = objective(inputs, 0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.process_time() - started)
    return batch / statistics.median(times[1:])


def billion(arrays: Path) -> None:
    """10^9 samples of 1,000 shards (in files of zeros without blocks): the real sampler from several positions."""
    rows = []
    resident = psutil.Process().memory_info
    for position in (0, 10**9, 10**9 - 17, 7 * 10**11):
        before = resident().rss
        started = time.process_time()
        samples = TokenSampler(arrays, "train", 0)
        batches = samples.batches(position, BATCH)
        next(batches)
        first = time.process_time()
        after_start = resident().rss
        for _ in islice(batches, 200):
            pass
        later = 200 * BATCH / (time.process_time() - first)
        grown = [f"{(size - before) / 2**20:.1f} MB" for size in (after_start, resident().rss)]
        rows.append([f"{position:,}", f"{first - started:.4f} s", f"{later:,.0f}", *grown])
    table(
        [
            "10^9 samples, from",
            "CPU until the first batch",
            "then samples a CPU second",
            "memory then",
            "after 200 batches more",
        ],
        rows,
    )


# --- loader ------------------------------------------------------------------------------------------------------

STEP_S, GATHER_S, STEPS = 0.060, 0.050, 100


def loader() -> None:
    """The table of `loader`. Steps and gathers sleep, so that nothing is measured but who waits for whom."""
    with tempfile.TemporaryDirectory() as folder:
        sampler = TokenSampler(hollow_arrays(Path(folder) / "arrays", 4, 10_000, 32, 16), "train", 0)
        gather = sampler.arrays.gather

        def slowly(*arguments: Any) -> Any:
            time.sleep(GATHER_S)
            return gather(*arguments)

        sampler.arrays.gather = slowly  # type: ignore[method-assign]
        ways: dict[str, Callable[[], Iterator[object]]] = {
            "the bare step": lambda: repeat(None),
            "gathered in the training thread": lambda: sampler._batches(0, BATCH, BATCH),
            "the loader": lambda: sampler.batches(0, BATCH),
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(ROUNDS):
            for name, make in ways.items():
                times[name].append(stepped_s(make()))
    bare, *others = (statistics.median(found) for found in times.values())
    rows = [[name, f"{s * 1e3:.1f} ms", f"{s / bare:.3f} x"] for name, s in zip(times, (bare, *others), strict=True)]
    table(["", "a step", "of the bare step"], rows)


def stepped_s(batches: Iterator[object]) -> float:
    """Seconds a step, from the second on."""
    next(batches)
    time.sleep(STEP_S)
    started = time.perf_counter()
    for _ in islice(batches, STEPS):
        time.sleep(STEP_S)
    return (time.perf_counter() - started) / STEPS


# --- tokenize ----------------------------------------------------------------------------------------------------


def tokenize() -> None:
    """The table of `tokenize`."""
    config = load_config(PipelineConfig, DEMO)
    rows = []
    for size in (config.prepare.image_size, 64):
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            encode, whole = tokenized_s(Path(folder), config, size)
        rows.append([f"{size} px", f"{encode:,.0f}", f"{whole:,.0f}", f"{whole / encode:.2f} x"])
    table(["", "the demo's encoder alone, images/s", "tokenize: read, decode, encode, write", ""], rows)


def tokenized_s(folder: Path, config: PipelineConfig, size: int) -> tuple[float, float]:
    """Images/s of the encoder alone, and of tokenize."""
    tokenizer = build(config.image_tokenizer.model, size).eval()
    prepared = shards(folder / "prepare", size)
    text = TextTokenizer.train([sample.caption for sample in read_samples(prepared, "train")], config.text_tokenizer)
    hashes = {"image-tokenizer": "", "text-tokenizer": ""}
    encoders = Encoders(tokenizer.encode, text.encode, tokenizer.levels, text.text_length, text.vocab_size, hashes)
    images = torch.from_numpy(np.stack([np.asarray(s.image) for s in read_samples(prepared, "train")]))
    batches = torch.split(images.permute(0, 3, 1, 2).float().div(255).contiguous(), BATCH)
    train = token_parts(prepared, ["train"])
    alone, whole = [], []
    for number in range(ROUNDS + 1):
        started = time.perf_counter()
        for batch in batches:
            tokenizer.encode(batch)
        alone.append(len(images) / (time.perf_counter() - started))
        started = time.perf_counter()
        out = folder / f"tokens{number}"
        list(tokenize_shards(TokenizeJob(out, prepared, encoders, TokenizeConfig(batch_size=BATCH), seed=0), train))
        whole.append(len(images) / (time.perf_counter() - started))
    return statistics.median(alone[1:]), statistics.median(whole[1:])


# --- duplicates --------------------------------------------------------------------------------------------------


def duplicates() -> None:
    """The lines of `duplicates`."""
    count, files = 1 << 24, 1 << 10
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{number}.npy" for number in range(files)]
        for path in paths:
            np.save(path, rng.integers(0, 2**64, (count // files, 2), dtype=np.uint64))
        for name, search in (
            ("equal keys, one slice", lambda: same_key(paths, [count // files] * files)),
            ("equal keys, 8 slices", lambda: same_key(paths, [count // files] * files, count // 8)),
            ("near images, 3 bits", lambda: same_image(paths, 3, np.zeros(count, bool))),
        ):
            started = time.perf_counter()
            found = search()
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            seconds = time.perf_counter() - started
            print(f"{count:,} samples, {name:<24}{seconds:6.1f} s, peak so far {peak:.1f} GB, {len(found)} found")


if __name__ == "__main__":
    name, *given = sys.argv[1:] or [""]
    if name == "stream":
        stream(given)
    elif name in ("sampler", "loader", "tokenize", "duplicates") and not given:
        {"sampler": sampler, "loader": loader, "tokenize": tokenize, "duplicates": duplicates}[name]()
    else:
        sys.exit(__doc__)
