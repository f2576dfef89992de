"""Image shards -> token arrays (format: `tokens.py`), shard by shard.

`tokenize_shards` makes the arrays of each image shard on its own: tasks share the shards, and a task may die and be run
again. `join` checks that all are there and whole, and writes the index.

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
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from pipeline.config.base import digest, identity
from pipeline.config.tokenize import TokenizeConfig
from pipeline.core.atomic_io import atomic_path, read_json, sha256_file, write_atomic, write_json
from pipeline.core.errors import UserError
from pipeline.core.level import Level
from pipeline.data import png
from pipeline.data.images import random_of
from pipeline.data.prefetch import ahead
from pipeline.data.shards import SPLITS, Sample, Shard, check_shard, read_index, read_shard
from pipeline.data.tokens import check_arrays, token_dtype


@dataclass(frozen=True)
class Encoders:
    """The two tokenizers, as functions.

    encode_images: float32 [B, 3, H, W] in [0, 1], on `device` -> a level's codes int64 [B, positions], for each level.
    encode_text: n captions -> int64 [n, text_length].
    hashes: name of the tokenizer -> hash of its files.
    """

    encode_images: Callable[[torch.Tensor], list[torch.Tensor]]
    encode_text: Callable[[list[str]], Any]
    levels: list[Level]
    text_length: int
    text_vocab_size: int
    hashes: dict[str, str]
    device: str = "cpu"
    count_text: Callable[[list[str]], list[int]] | None = None  # n captions -> tokens of each before cutting


@dataclass(frozen=True)
class _Batch:
    keys: list[str]
    captions: list[str]
    cut: int  # captions longer than text_length tokens
    text: NDArray[np.int64]  # [n, text_length]
    images: torch.Tensor  # uint8 [n * crops, 3, H, W], the crops of a sample one after the other
    codes: list[torch.Tensor]  # of each level, int64 [n * crops, positions]; empty if not encoded yet


@dataclass(frozen=True)
class _End:
    """Comes after the last batch of a shard."""

    shard: Shard
    crops: int
    made_from: str | None  # None: its arrays were there


def hash_of_files(folder: Path, names: list[str]) -> str:
    """One hash of the contents of the named files of a folder."""
    return digest([[name, sha256_file(folder / name)] for name in names])


def tokenizer_hashes(image_dir: Path, text_dir: Path) -> dict[str, str]:
    """Name of each tokenizer -> hash of its files; the index records them."""
    return {
        "image-tokenizer": hash_of_files(image_dir, ["config.json", "model.safetensors"]),
        "text-tokenizer": hash_of_files(text_dir, ["config.json", "tokenizer.json"]),
    }


def all_shards(prepare_dir: Path) -> list[tuple[str, Shard]]:
    """(split, image shard) of everything that is to be tokenized, in a fixed order."""
    splits = read_index(prepare_dir)["splits"]
    return [(split, Shard(**entry)) for split in SPLITS for entry in splits[split]["shards"]]


def tokenize_shards(
    directory: Path,
    prepare_dir: Path,
    shards: Sequence[tuple[str, Shard]],
    encoders: Encoders,
    config: TokenizeConfig,
    seed: int,
) -> Generator[bool, None, None]:
    """Make the token arrays of these (split, image shard) in `directory`, unless they are there and whole.

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
        steps = ahead(_steps(directory, prepare_dir, shards, encoders, config, seed, pool), torch.get_num_threads() + 1)
        with closing(steps):
            for step in steps:
                if isinstance(step, Future):
                    batch = step.result()
                    arrays.keys += batch.keys
                    arrays.captions += batch.captions
                    arrays.cut += batch.cut
                    arrays.text.append(batch.text)
                    found = batch.codes or _encoded(batch.images, encoders, config.batch_size)
                    arrays.fetch(late)
                    late = found
                    continue
                if step.made_from is None:
                    writing.append(writer.submit(bool))
                else:
                    arrays.fetch(late)
                    writing.append(writer.submit(_write, directory, step, arrays, encoders))
                    arrays, late = _Arrays([]), []
                if len(writing) > 1:
                    yield writing.popleft().result()
        while writing:
            yield writing.popleft().result()


@contextmanager
def _workers() -> Iterator[ThreadPoolExecutor]:
    """Threads for images, in which an operation of torch is no more threads.

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
    """What is known of the shard at hand."""

    keys: list[str]
    captions: list[str] = field(default_factory=list)
    cut: int = 0
    text: list[NDArray[np.int64]] = field(default_factory=list)
    codes: list[list[torch.Tensor]] = field(default_factory=list)  # batches, each of every level

    def fetch(self, late: list[torch.Tensor]) -> None:
        """Add a batch's codes of every level, from wherever they are."""
        if late:
            self.codes.append([level_codes.cpu() for level_codes in late])


def _write(directory: Path, end: _End, arrays: _Arrays, encoders: Encoders) -> bool:
    """Write the arrays of a shard, and then the record that vouches for them."""
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
    checksums = {name: sha256_file(directory / name) for name in (*names.values(), *code_names)}
    entry = {**names, "codes": code_names, "samples": count, "crops": end.crops}
    entry |= {"captions_cut": arrays.cut, "sha256": checksums}
    write_json(directory / f"{stem}.json", {"made_from": end.made_from, "shard": entry})
    return True


def join(directory: Path, prepare_dir: Path, encoders: Encoders, config: TokenizeConfig, seed: int) -> dict[str, Any]:
    """Check that every image shard has its token arrays, made from it; write index.json and return it.

    Raises UserError when one is missing, was made from something else, or is not what its checksum says.
    """
    splits: dict[str, Any] = {split: {"samples": 0, "captions_cut": 0, "shards": []} for split in SPLITS}
    for split, shard in all_shards(prepare_dir):
        record_path = directory / f"{shard.stem}.json"
        made_from = _made_from(shard, encoders, config, seed)
        record = read_json(record_path) if record_path.is_file() else {}
        if record.get("made_from") != made_from or record["shard"]["samples"] != shard.samples:
            raise UserError(f"{record_path}: expected the tokens of {shard.name}, found none of it: run tokenize again")
        check_arrays(directory, record["shard"])
        splits[split]["shards"].append(record["shard"])
        splits[split]["samples"] += shard.samples
        splits[split]["captions_cut"] += record["shard"].get("captions_cut", 0)
    index = {
        "levels": [level._asdict() for level in encoders.levels],
        "text_length": encoders.text_length,
        "text_vocab_size": encoders.text_vocab_size,
        "tokenizers": encoders.hashes,
        "splits": splits,
    }
    write_json(directory / "index.json", index)
    return index


def crop_of(image: Image.Image, crop: int, min_scale: float, *name: object) -> Image.Image:
    """Version number `crop` of a square image: 0 is the whole, others are random squares of it, resized back."""
    if crop == 0:
        return image
    rng = random_of(*name, crop)
    size = image.width
    side = size * rng.uniform(min_scale, 1.0)
    left, top = rng.uniform(0, size - side), rng.uniform(0, size - side)
    return image.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))


def _steps(
    directory: Path,
    prepare_dir: Path,
    shards: Sequence[tuple[str, Shard]],
    encoders: Encoders,
    config: TokenizeConfig,
    seed: int,
    pool: ThreadPoolExecutor,
) -> Iterator[Future[_Batch] | _End]:
    """For each shard, unless it is finished, its batches, which `pool` is making; then its end."""
    for split, shard in shards:
        made_from = _made_from(shard, encoders, config, seed)
        if _is_finished(directory, directory / f"{shard.stem}.json", made_from):
            yield _End(shard, 0, None)
            continue
        check_shard(prepare_dir / shard.name, shard)
        crops = config.crops if split == "train" else 1
        for chunk in _chunks(read_shard(prepare_dir, shard), max(1, config.batch_size // crops)):
            yield pool.submit(_batch, chunk, crops, encoders, config, seed)
        yield _End(shard, crops, made_from)


def _batch(chunk: list[Sample], crops: int, encoders: Encoders, config: TokenizeConfig, seed: int) -> _Batch:
    versions = [version for sample in chunk for version in _versions(sample, crops, config.min_crop_scale, seed)]
    images = torch.from_numpy(np.stack(versions))
    codes: list[torch.Tensor] = []
    if encoders.device.startswith("cuda"):
        images = images.pin_memory()
    elif encoders.device == "cpu":
        codes = _encoded(images, encoders, config.batch_size)
    captions = [sample.caption for sample in chunk]
    text = np.asarray(encoders.encode_text(captions))
    full = [caption for caption, ids in zip(captions, text, strict=True) if ids[-1] != 0]
    counts = encoders.count_text(full) if full and encoders.count_text else []
    cut = sum(count > encoders.text_length for count in counts)
    return _Batch([sample.key for sample in chunk], captions, cut, text, images, codes)


def _versions(sample: Sample, crops: int, min_scale: float, seed: int) -> Iterator[NDArray[np.uint8]]:
    """The whole image and its random crops, uint8 [3, H, W] each."""
    whole = png.decode(sample.png)
    yield whole
    if crops > 1:
        image = Image.fromarray(whole.transpose(1, 2, 0))
        for crop in range(1, crops):
            yield np.asarray(crop_of(image, crop, min_scale, "tokenize", seed, sample.key)).transpose(2, 0, 1)


def _encoded(images: torch.Tensor, encoders: Encoders, batch_size: int) -> list[torch.Tensor]:
    """Codes of each level on the device, int64 [len(images), positions]."""
    found: list[list[torch.Tensor]] = [[] for _ in encoders.levels]
    with torch.no_grad():
        for part in torch.split(images.to(encoders.device, non_blocking=True), batch_size):
            for number, level_codes in enumerate(encoders.encode_images(part.float().div_(255))):
                found[number].append(level_codes)
    return [torch.cat(parts) for parts in found]


def _chunks(samples: Iterator[Sample], size: int) -> Iterator[list[Sample]]:
    while chunk := list(islice(samples, size)):
        yield chunk


def _save(path: Path, array: NDArray[np.int64], vocabulary: int) -> None:
    if array.size and not 0 <= int(array.min()) <= int(array.max()) < vocabulary:
        raise UserError(f"{path.name}: expected codes in [0, {vocabulary}), found {array.min()} to {array.max()}")
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.save(file, array.astype(token_dtype(vocabulary)))


def _made_from(shard: Shard, encoders: Encoders, config: TokenizeConfig, seed: int) -> str:
    return digest([shard.sha256, encoders.hashes, identity(config), seed])


def _is_finished(directory: Path, record_path: Path, made_from: str) -> bool:
    if not record_path.is_file():
        return False
    record = read_json(record_path)
    if record["made_from"] != made_from:
        return False
    files = record["shard"]["sha256"].items()
    return all((directory / name).is_file() and sha256_file(directory / name) == sha256 for name, sha256 in files)
