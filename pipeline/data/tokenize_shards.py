"""Image shards -> token arrays (format: `tokens.py`), shard by shard.

    job = TokenizeJob(directory, prepare_dir, encoders, config, seed)
    for made in tokenize_shards(job, token_parts(prepare_dir)[task::tasks]): ...
    index = join(job)

`tokenize_shards` makes the arrays of each image shard on its own, and puts those of a part (`token_parts.py`) into one
file: tasks share the parts, and a task may die and be run again. `join` checks that all are there and writes the index.

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

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from pipeline.config.base import digest, identity
from pipeline.config.tokenize import TokenizeConfig
from pipeline.core.atomic_io import sha256_file, write_json
from pipeline.core.iteration import batched
from pipeline.core.level import Level
from pipeline.core.seeds import random_of
from pipeline.data import stored_image
from pipeline.data.augment import random_part
from pipeline.data.catalog import Catalog
from pipeline.data.prefetch import ahead
from pipeline.data.shard_file import check_shard
from pipeline.data.shards import Sample, Shard, read_index, read_shard
from pipeline.data.splits import SPLITS
from pipeline.data.token_blocks import Content, Records, Shape
from pipeline.data.token_parts import Part, PartWriter, remove_others, token_parts
from pipeline.data.tokens import FORMAT, LevelEntry, TokenIndex, write_records


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

    def writer(self, part: Part) -> PartWriter:
        """What writes the arrays of a part, and knows which are there."""
        made_from = [self.made_from(shard) for shard in part.shards]
        return PartWriter(self.directory, part, self.shape(part.split), made_from)

    def shape(self, split: str) -> Shape:
        """What the arrays of a split have in common."""
        encoders = self.encoders
        crops = self.config.crops if split == "train" else 1
        return Shape(encoders.text_length, encoders.text_vocab_size, tuple(encoders.levels), crops)


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

    writer: PartWriter
    number: int  # of the shard in its part
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


def tokenize_shards(job: TokenizeJob, parts: Sequence[Part]) -> Generator[bool, None, None]:
    """Make the token arrays of the image shards of these parts, unless they are there and as recorded.

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
        steps = ahead(_steps(job, parts, pool), torch.get_num_threads() + 1)
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
                    writing.append(writer.submit(_write, step, arrays))
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


def _write(end: _End, arrays: _Arrays) -> bool:
    """Write the arrays of a shard into the file of its part."""
    count = len(arrays.keys)
    codes = [torch.cat(parts).view(count, end.crops, -1).numpy() for parts in zip(*arrays.codes, strict=True)]
    text = np.concatenate(arrays.text)
    content = Content(arrays.keys, arrays.captions, arrays.caption_counts, arrays.cut, text, codes)
    end.writer.write(end.number, content)
    return True


def join(job: TokenizeJob) -> TokenIndex:
    """Check that every image shard has its token arrays, made from it; write the index and return it.

    Only sizes of files are looked at: `tokenize_shards`, which found the arrays or made them, compares contents.

    Raises:
        UserError: the arrays of a shard are missing, or were made from something else.
    """
    records: dict[str, list[Records]] = {split: [] for split in SPLITS}
    parts = token_parts(job.prepare_dir)
    for part in parts:
        records[part.split].append(job.writer(part).check())
    remove_others(job.directory, parts)
    encoders = job.encoders
    levels: list[LevelEntry] = [
        {"height": level.height, "width": level.width, "codebook_size": level.codebook_size}
        for level in encoders.levels
    ]
    index: TokenIndex = {
        "format": FORMAT,
        "levels": levels,
        "text_length": encoders.text_length,
        "text_vocab_size": encoders.text_vocab_size,
        "tokenizers": encoders.hashes,
        "precision": encoders.precision,
        "splits": {
            split: write_records(job.directory, split, found, job.shape(split).crops)
            for split, found in records.items()
        },
    }
    for split, prepared in read_index(job.prepare_dir)["splits"].items():
        if "sources" in prepared:
            index["splits"][split]["sources"] = prepared["sources"]
    write_json(job.directory / "index.json", index)
    return index


def crop_of(image: Image.Image, crop: int, min_scale: float, *name: object) -> Image.Image:
    """Version number `crop` of an image: 0 is the whole, others are random parts of it of its shape, resized back.

    Args:
        min_scale: smallest side of a random part / side of the image.
        name: what the random numbers are a function of, beside `crop`.
    """
    return random_part(image, min_scale, random_of(*name, crop)) if crop else image


def _steps(
    job: TokenizeJob, parts: Sequence[Part], pool: ThreadPoolExecutor
) -> Generator[Future[_Batch] | _End, None, None]:
    """The batches of each shard that is not finished, which `pool` is making, and after them the shard's end."""
    catalogs: dict[str, Catalog] = {}  # where images stay in the users' tars
    for part in parts:
        writer, crops = job.writer(part), job.shape(part.split).crops
        for number, shard in enumerate(part.shards):
            if shard.tar is not None and part.split not in catalogs:
                catalogs[part.split] = Catalog(job.prepare_dir, part.split)
            if writer.is_finished(number):
                yield _End(writer, number, crops, is_new=False)
                continue
            check_shard(job.prepare_dir, shard)
            catalog = catalogs[part.split] if shard.tar is not None else None
            own = catalog.shard_samples(shard.name) if catalog else read_shard(job.prepare_dir, shard)
            for samples in batched(own, max(1, job.config.batch_size // crops)):
                yield pool.submit(_batch, job, samples, crops)
            yield _End(writer, number, crops, is_new=True)


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
