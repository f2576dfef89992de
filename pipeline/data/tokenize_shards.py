"""Image shards -> token arrays (format: `tokens.py`), shard by shard.

    job = TokenizeJob(directory, prepare_dir, encoders, config, seed)
    for made in tokenize_shards(job, all_shards(prepare_dir)[task::tasks]): ...
    index = join(job)

`tokenize_shards` makes the arrays of each image shard on its own: tasks share the shards, and a task may die and be run
again. `join` checks that all are there and as recorded, and writes the index.

Threads decode and crop images and encode their captions; on a CPU they run the image tokenizer too, a batch each; on
a GPU the main thread does. Meanwhile one thread reads on, across the borders of shards, and another writes the arrays
of the shard before. On a GPU, images travel as bytes from pinned memory, and codes come back one batch late, so that
neither way waits. All images of a shard are of one size, so batches need no sorting to be full.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from pipeline.config.base import digest, identity
from pipeline.config.tokenize import TokenizeConfig
from pipeline.core.atomic_io import atomic_path, read_json, sha256_file, write_atomic, write_json
from pipeline.core.errors import UserError
from pipeline.core.iteration import batched
from pipeline.core.level import Level
from pipeline.core.manifest import first_fault
from pipeline.core.seeds import random_of
from pipeline.data import stored_image
from pipeline.data.catalog import Catalog
from pipeline.data.prefetch import ahead
from pipeline.data.shards import Sample, Shard, check_shard, read_index, read_shard
from pipeline.data.splits import SPLITS
from pipeline.data.tokens import (
    LARGEST_ROW,
    TokenIndex,
    TokenShard,
    TokenSplit,
    array_records,
    check_arrays,
    token_dtype,
)


@dataclass(frozen=True)
class Encoders:
    """The two tokenizers, as functions.

    Attributes:
        encode_images: float32 [B, 3, H, W] in [0, 1], on `device` -> the codes of each level, int64 [B, positions].
        encode_text: n captions -> int64 [n, text_length].
        hashes: name of the tokenizer -> hash of its files.
        count_text: n captions -> tokens of each before cutting.
    """

    encode_images: Callable[[torch.Tensor], list[torch.Tensor]]
    encode_text: Callable[[list[str]], torch.Tensor]
    levels: list[Level]
    text_length: int
    text_vocab_size: int
    hashes: dict[str, str]
    device: str = "cpu"
    precision: str = "float32"  # of the products and convolutions that codes come from
    count_text: Callable[[list[str]], list[int]] | None = None


class ShardRecord(TypedDict):
    """The record of a finished shard, written last."""

    made_from: str
    shard: TokenShard


@dataclass(frozen=True)
class TokenizeJob:
    """Which image shards become token arrays, where, and by what."""

    directory: Path  # of the token arrays
    prepare_dir: Path
    encoders: Encoders
    config: TokenizeConfig
    seed: int

    def made_from(self, shard: Shard) -> str:
        """The hash of all that decides the arrays of an image shard."""
        return digest([shard.sha256, self.encoders.hashes, identity(self.config), self.seed])

    def record(self, shard: Shard) -> ShardRecord | None:
        """The record of an image shard's arrays; None if there is none, or they were made from something else."""
        path = self.record_path(shard)
        record: ShardRecord | None = read_json(path) if path.is_file() else None
        return record if record and record["made_from"] == self.made_from(shard) else None

    def record_path(self, shard: Shard) -> Path:
        """The file of `record`."""
        return self.directory / f"{shard.stem}.json"

    def is_finished(self, shard: Shard) -> bool:
        """Are the arrays of an image shard there, and as recorded?"""
        record = self.record(shard)
        return record is not None and first_fault(self.directory, array_records(record["shard"])) is None


@dataclass(frozen=True)
class _Batch:
    keys: list[str]
    captions: list[str]  # of all samples
    caption_counts: list[int]  # of each sample
    cut: int  # captions longer than text_length tokens
    text: NDArray[np.int64]  # [captions, text_length]
    images: torch.Tensor  # uint8 [n * crops, 3, H, W], the crops of a sample one after the other
    codes: list[torch.Tensor]  # of each level, int64 [n * crops, positions]; empty if not encoded yet


@dataclass(frozen=True)
class _End:
    """What comes after the last batch of a shard."""

    shard: Shard
    crops: int
    is_new: bool  # False: its arrays were there


def hash_of_files(folder: Path, names: list[str]) -> str:
    """The hash of the names and contents of these files of a folder."""
    return digest([[name, sha256_file(folder / name)] for name in names])


def tokenizer_hashes(image_dir: Path, text_dir: Path) -> dict[str, str]:
    """The hash of each tokenizer's files, by its name; the index records them."""
    return {
        "image-tokenizer": hash_of_files(image_dir, ["config.json", "model.safetensors"]),
        "text-tokenizer": hash_of_files(text_dir, ["config.json", "tokenizer.json"]),
    }


def all_shards(prepare_dir: Path) -> list[tuple[str, Shard]]:
    """(split, image shard) of everything that is to be tokenized, in a fixed order."""
    splits = read_index(prepare_dir)["splits"]
    return [(split, Shard(**entry)) for split in SPLITS for entry in splits[split]["shards"]]


def tokenize_shards(job: TokenizeJob, shards: Sequence[tuple[str, Shard]]) -> Generator[bool, None, None]:
    """Make the token arrays of these (split, image shard), unless they are there and as recorded.

    Yields for each shard in turn, when its arrays lie on the disk, whether there was something to do. When closed early
    it still writes the shard that is computed.

    Raises:
        UserError: an image shard is damaged, a code is out of range, or the disk is full.
    """
    arrays = _Arrays([])
    # Codes stay on the GPU until the next batch is in its queue: fetching them would wait for their own.
    late: list[torch.Tensor] = []
    writing: deque[Future[bool]] = deque()  # a shard is written while the next one is computed
    with _workers() as pool, ThreadPoolExecutor(1, thread_name_prefix="write") as writer:
        steps = ahead(_steps(job, shards, pool), torch.get_num_threads() + 1)
        with closing(steps):
            for step in steps:
                if isinstance(step, Future):
                    batch = step.result()
                    arrays.keys += batch.keys
                    arrays.captions += batch.captions
                    arrays.caption_counts += batch.caption_counts
                    arrays.cut += batch.cut
                    arrays.text.append(batch.text)
                    found = batch.codes or _encoded(job, batch.images)
                    arrays.fetch(late)
                    late = found
                    continue
                if step.is_new:
                    arrays.fetch(late)
                    writing.append(writer.submit(_write, job, step, arrays))
                    arrays, late = _Arrays([]), []
                else:
                    writing.append(writer.submit(bool))
                if len(writing) > 1:
                    yield writing.popleft().result()
        while writing:
            yield writing.popleft().result()


@contextmanager
def _workers() -> Iterator[ThreadPoolExecutor]:
    """Threads for images, in which an operation of torch starts no more threads.

    Threads of an operation wait for each other, and on a busy core for the threads that decode: with them, tokenize
    ran at 0.4 of the encoder's own speed on two cores.
    """
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, "images", torch.set_num_threads, (1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)


@dataclass
class _Arrays:
    """What the batches of one shard have brought so far."""

    keys: list[str]
    captions: list[str] = field(default_factory=list)
    caption_counts: list[int] = field(default_factory=list)
    cut: int = 0
    text: list[NDArray[np.int64]] = field(default_factory=list)
    codes: list[list[torch.Tensor]] = field(default_factory=list)  # of each batch, the codes of every level

    def fetch(self, late: list[torch.Tensor]) -> None:
        """Add a batch's codes of every level, from wherever they are."""
        if late:
            self.codes.append([level_codes.cpu() for level_codes in late])


def _write(job: TokenizeJob, end: _End, arrays: _Arrays) -> bool:
    """Write the arrays of a shard, and then the record that vouches for them."""
    directory, encoders = job.directory, job.encoders
    stem, count = end.shard.stem, len(arrays.keys)
    names = {"text": f"{stem}.text.npy", "keys": f"{stem}.keys.txt", "captions": f"{stem}.captions.txt"}
    code_names = [f"{stem}.codes.{level}.npy" for level in range(len(encoders.levels))]
    _save(directory / names["text"], np.concatenate(arrays.text), encoders.text_vocab_size)
    for name, level, parts in zip(code_names, encoders.levels, zip(*arrays.codes, strict=True), strict=True):
        _save(directory / name, torch.cat(parts).view(count, end.crops, -1).numpy(), level.codebook_size)
    write_atomic(directory / names["keys"], "".join(f"{key}\n" for key in arrays.keys))
    # A line break is white space like any other, which the text tokenizer makes a space.
    lines = (caption.replace("\n", " ") for caption in arrays.captions)
    write_atomic(directory / names["captions"], "".join(f"{line}\n" for line in lines))
    several = max(arrays.caption_counts) > 1
    if several:
        names["rows"] = f"{stem}.rows.npy"
        _save(directory / names["rows"], np.cumsum([0, *arrays.caption_counts]), LARGEST_ROW)
    checksums = {name: sha256_file(directory / name) for name in (*names.values(), *code_names)}
    entry: TokenShard = {
        "text": names["text"],
        "keys": names["keys"],
        "captions": names["captions"],
        "codes": code_names,
        "samples": count,
        "crops": end.crops,
        "captions_cut": arrays.cut,
        "sha256": checksums,
    }
    if several:
        entry |= {"rows": names["rows"], "text_rows": len(arrays.captions)}
    write_json(job.record_path(end.shard), {"made_from": job.made_from(end.shard), "shard": entry})
    return True


def join(job: TokenizeJob) -> TokenIndex:
    """Check that every image shard has its token arrays, made from it; write index.json and return it.

    Raises:
        UserError: the arrays of a shard are missing, were made from something else, or are not as recorded.
    """
    splits: dict[str, TokenSplit] = {split: {"samples": 0, "captions_cut": 0, "shards": []} for split in SPLITS}
    for split, shard in all_shards(job.prepare_dir):
        record = job.record(shard)
        if record is None or record["shard"]["samples"] != shard.samples:
            raise UserError(
                f"{job.record_path(shard)}: expected the tokens of {shard.name}, found none of it: run tokenize again"
            )
        check_arrays(job.directory, record["shard"])
        splits[split]["shards"].append(record["shard"])
        splits[split]["samples"] += shard.samples
        splits[split]["captions_cut"] += record["shard"].get("captions_cut", 0)
    encoders = job.encoders
    index: TokenIndex = {
        "levels": [
            {"height": level.height, "width": level.width, "codebook_size": level.codebook_size}
            for level in encoders.levels
        ],
        "text_length": encoders.text_length,
        "text_vocab_size": encoders.text_vocab_size,
        "tokenizers": encoders.hashes,
        "precision": encoders.precision,
        "splits": splits,
    }
    for split, prepared in read_index(job.prepare_dir)["splits"].items():
        if "sources" in prepared:
            index["splits"][split]["sources"] = prepared["sources"]
    write_json(job.directory / "index.json", index)
    return index


def crop_of(image: Image.Image, crop: int, min_scale: float, *name: object) -> Image.Image:
    """Version number `crop` of a square image: 0 is the whole, others are random squares of it, resized back.

    Args:
        min_scale: smallest side of a random square / side of the image.
        name: what the random numbers are a function of, beside `crop`.
    """
    if crop == 0:
        return image
    rng = random_of(*name, crop)
    size = image.width
    side = size * rng.uniform(min_scale, 1.0)
    left, top = rng.uniform(0, size - side), rng.uniform(0, size - side)
    return image.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))


def _steps(
    job: TokenizeJob, shards: Sequence[tuple[str, Shard]], pool: ThreadPoolExecutor
) -> Generator[Future[_Batch] | _End, None, None]:
    """The batches of each shard that is not finished, which `pool` is making, and after them the shard's end."""
    catalogs: dict[str, Catalog] = {}  # where images stay in the users' tars
    for split, shard in shards:
        if shard.tar is not None and split not in catalogs:
            catalogs[split] = Catalog(job.prepare_dir, split)
        if job.is_finished(shard):
            yield _End(shard, crops=0, is_new=False)
            continue
        check_shard(job.prepare_dir, shard)
        crops = job.config.crops if split == "train" else 1
        own = read_shard(job.prepare_dir, shard) if shard.tar is None else catalogs[split].shard_samples(shard.name)
        for samples in batched(own, max(1, job.config.batch_size // crops)):
            yield pool.submit(_batch, job, samples, crops)
        yield _End(shard, crops, is_new=True)


def _batch(job: TokenizeJob, samples: list[Sample], crops: int) -> _Batch:
    encoders = job.encoders
    versions = [version for sample in samples for version in _versions(job, sample, crops)]
    images = torch.from_numpy(np.stack(versions))
    codes: list[torch.Tensor] = []
    if encoders.device.startswith("cuda"):
        images = images.pin_memory()
    elif encoders.device == "cpu":
        codes = _encoded(job, images)
    captions = [caption for sample in samples for caption in sample.captions]
    text = encoders.encode_text(captions).numpy()
    full = [caption for caption, ids in zip(captions, text, strict=True) if ids[-1] != 0]
    counts = encoders.count_text(full) if full and encoders.count_text else []
    cut = sum(count > encoders.text_length for count in counts)
    counts_of_samples = [len(sample.captions) for sample in samples]
    return _Batch([sample.key for sample in samples], captions, counts_of_samples, cut, text, images, codes)


def _versions(job: TokenizeJob, sample: Sample, crops: int) -> Iterator[NDArray[np.uint8]]:
    """The whole image and its random crops, uint8 [3, H, W] each."""
    whole = stored_image.decode(sample.encoded, sample.cut)
    yield whole
    if crops > 1:
        image = Image.fromarray(whole.transpose(1, 2, 0))
        for crop in range(1, crops):
            cropped = crop_of(image, crop, job.config.min_crop_scale, "tokenize", job.seed, sample.key)
            yield np.asarray(cropped).transpose(2, 0, 1)


def _encoded(job: TokenizeJob, images: torch.Tensor) -> list[torch.Tensor]:
    """The codes of each level, on the device, int64 [len(images), positions]; `images` uint8 [n, 3, H, W]."""
    encoders = job.encoders
    found: list[list[torch.Tensor]] = [[] for _ in encoders.levels]
    with torch.no_grad():
        for part in torch.split(images.to(encoders.device, non_blocking=True), job.config.batch_size):
            for number, level_codes in enumerate(encoders.encode_images(part.float().div_(255))):
                found[number].append(level_codes)
    return [torch.cat(parts) for parts in found]


def _save(path: Path, array: NDArray[np.int64], vocabulary: int) -> None:
    if array.size and not 0 <= int(array.min()) <= int(array.max()) < vocabulary:
        raise UserError(f"{path.name}: expected codes in [0, {vocabulary}), found {array.min()} to {array.max()}")
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.save(file, array.astype(token_dtype(vocabulary)))
