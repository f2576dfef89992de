"""Image shards: WebDataset tars of one size of image, with an index.

    prepare/index.json             image size; samples and bytes of each split; what was rejected
    prepare/train.shards           samples, bytes and SHA-256 of every shard (`shard_table.py`)
    prepare/train/000000.tar       members KEY.json, KEY.png (or .webp, .jpg) and KEY.txt (caption), one sample after
                                   the other; where an image has several captions, KEY.captions.json with all of them
    prepare/train/000000.index.npy int64 [samples, 3]: first byte, number of bytes and CRC-32 of each image

With `prepare.storage: in-place` there is no tar but the user's, and the index has eight columns: after these three the
cut (`stored_image.Cut`) and a CRC-32 of key and captions, which the catalog has.

Any tool that reads WebDataset tars reads these. The `.index.npy` beside a tar makes it random access
(`shard_file.py`), so that `stream.py` reads the samples of a shard in any order, skips without reading, and notices a
tar that is another one. A tar may have been pushed to an object store (`pushed.py`).
"""

from __future__ import annotations

import io
import json
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NotRequired, TypedDict, overload

import numpy as np
from PIL import Image

from pipeline.config.prepare import Storage
from pipeline.core.atomic_io import atomic_path, read_json, sha256_file, write_json
from pipeline.core.errors import UserError
from pipeline.core.image_io import png_bytes
from pipeline.core.image_size import ImageSize
from pipeline.data import stored_image
from pipeline.data.opened_file import Sliced, mapped
from pipeline.data.shard_table import ShardEntry, ShardTable, read_table, write_table
from pipeline.data.stored_image import Cut

_BLOCK = 512  # tar pads every member to whole blocks
_EXTENSIONS = tuple(stored_image.EXTENSIONS.values())
_CAPTIONS = ".captions.json"  # member of an image with several captions


class SplitIndex(TypedDict):
    """A split in index.json."""

    samples: int
    bytes: int
    captions: NotRequired[int]  # of all samples; missing: an earlier version did not count them
    shards: Sequence[ShardEntry]  # in the file, `TableEntry`; earlier versions had a list there
    sources: NotRequired[list[int]]  # samples of each of several sources, whose shards lie one source after the other


class CatalogEntry(TypedDict):
    """The catalog of a split in index.json."""

    bytes: dict[str, int]  # of each column, by name
    sha256: str  # of the file of checksums


class Rejected(TypedDict):
    """How many samples were rejected, and how many for each reason."""

    samples: int
    reasons: dict[str, int]


class PrepareIndex(TypedDict):
    """index.json of `prepare`."""

    image_size: ImageSize  # a list of two, read from the file
    storage: NotRequired[Storage]  # missing: png
    splits: dict[str, SplitIndex]
    catalog: NotRequired[dict[str, CatalogEntry]]  # by split; missing: an earlier version wrote none
    rejected: Rejected
    left_out: NotRequired[dict[str, int]]  # by reason: what the rules of the source leave out
    source_samples: NotRequired[int]  # kept, rejected and left out
    conversions: dict[str, int]
    credit: str | None  # where the images come from, for pages that show them


@dataclass(frozen=True)
class Sample:
    """A captioned image of an image shard. The image is decoded when first asked for."""

    key: str
    encoded: bytes  # the image's file, as it is stored
    caption: str
    meta: Mapping[str, object]
    further: tuple[str, ...] = ()  # captions beside the first
    cut: Cut | None = None  # what is kept of the image, where its file is the user's
    offset: int = 0  # of the image in the user's tar

    @property
    def captions(self) -> tuple[str, ...]:
        """All captions of the image, at least one."""
        return (self.caption, *self.further)

    @cached_property
    def image(self) -> Image.Image:
        """RGB, of image_size."""
        return Image.fromarray(stored_image.decode(self.encoded, self.cut).transpose(1, 2, 0))

    @property
    def png(self) -> bytes:
        """The image as a PNG file, in whatever format it is stored."""
        is_png = self.cut is None and stored_image.storage_of(self.encoded) == "png"
        return self.encoded if is_png else png_bytes(self.image)


@dataclass(frozen=True)
class Shard:
    """An entry of index.json. `name` is relative to the stage's directory, e.g. `train/000000.tar`."""

    name: str
    samples: int
    bytes: int
    sha256: str
    captions: int | None = None  # of all samples; None: one each
    tar: str | None = None  # path or URL of the user's, in which the images stay; None: this shard is a tar
    tar_bytes: int | None = None

    def path(self, prepare_dir: Path) -> str:
        """The tar that holds the images; where it is the user's, its path or URL."""
        return self.tar if self.tar is not None else str(prepare_dir / self.name)

    @property
    def stem(self) -> str:
        """The name without its extension, which token arrays begin with, too."""
        return self.name.removesuffix(".tar")


def caption_count(split: SplitIndex) -> int:
    """How many captions a split has; as many as samples, unless `prepare.caption` is random."""
    if "captions" in split:
        return split["captions"]
    return sum(shard.get("captions", shard["samples"]) for shard in split["shards"])


def index_path(tar: Path) -> Path:
    """The `.index.npy` beside a tar."""
    return tar.with_suffix(".index.npy")


class ShardWriter:
    """A tar and its index, sample by sample; `open_shard` makes one."""

    bytes: int  # of the tar; once it is closed
    sha256: str

    def __init__(self, tar: tarfile.TarFile) -> None:
        self.index: list[tuple[int, int, int]] = []  # first byte, number of bytes and CRC-32 of each image
        self._tar = tar

    def add(self, sample: Sample) -> None:
        """Append a sample."""
        extension = stored_image.EXTENSIONS[stored_image.storage_of(sample.encoded)]
        _add(self._tar, f"{sample.key}.json", json.dumps(sample.meta, sort_keys=True).encode())
        begin = _add(self._tar, f"{sample.key}.{extension}", sample.encoded)
        self.index.append((begin, len(sample.encoded), zlib.crc32(sample.encoded)))
        _add(self._tar, f"{sample.key}.txt", sample.caption.encode())
        if sample.further:
            _add(self._tar, sample.key + _CAPTIONS, json.dumps(sample.captions).encode())


@contextmanager
def open_shard(path: Path) -> Iterator[ShardWriter]:
    """A writer of the tar at `path` and of its index, which are there when the block ends without error.

    The same samples give the same bytes: no times, no owners, fixed order of members.
    """
    with atomic_path(path) as temporary:
        with tarfile.open(temporary, "w", format=tarfile.GNU_FORMAT) as tar:
            writer = ShardWriter(tar)
            yield writer
        writer.bytes, writer.sha256 = temporary.stat().st_size, sha256_file(temporary)
        with atomic_path(index_path(path)) as temporary_index, open(temporary_index, "wb") as file:
            np.save(file, np.array(writer.index, dtype=np.int64).reshape(-1, 3))


def write_shard(path: Path, samples: Iterable[Sample]) -> None:
    """Write a tar and its index, atomically."""
    with open_shard(path) as writer:
        for sample in samples:
            writer.add(sample)


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> int:
    """Append a member; returns where its content begins."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    member.mode = 0o644
    tar.addfile(member, io.BytesIO(content))
    tar.members = []  # type: ignore[attr-defined]  # it remembers every header
    return tar.offset - -(-len(content) // _BLOCK) * _BLOCK


def read_index(prepare_dir: Path) -> PrepareIndex:
    """The index.json of a finished `prepare`. Raises UserError when there is none."""
    path = Path(prepare_dir) / "index.json"
    if not path.is_file():
        raise UserError(f"expected image shards with an index at {path}, found none: run the stage prepare first")
    found = read_json(path)
    for split, entry in found["splits"].items():
        if not isinstance(entry["shards"], list):  # as earlier versions wrote them
            entry["shards"] = read_table(path.with_name(f"{split}.shards"), split, entry["shards"])
    index: PrepareIndex = found
    return index


def write_index(prepare_dir: Path, index: PrepareIndex) -> None:
    """Write index.json, after the tables of shards that it has the hashes of."""
    splits = {
        split: {**entry, "shards": write_table(prepare_dir / f"{split}.shards", entry["shards"])}
        for split, entry in index["splits"].items()
    }
    write_json(prepare_dir / "index.json", {**index, "splits": splits})


class Shards(Sequence[Shard]):
    """The shards of a split, in their fixed order. Each is made when it is asked for.

    Attributes:
        samples: of each, int64.
    """

    def __init__(self, entries: Sequence[ShardEntry]) -> None:
        self._entries = entries
        if isinstance(entries, ShardTable):
            self.samples = entries.samples
        else:
            self.samples = np.array([entry["samples"] for entry in entries], np.int64)

    def __len__(self) -> int:
        return len(self._entries)

    @overload
    def __getitem__(self, index: int) -> Shard: ...
    @overload
    def __getitem__(self, index: slice) -> Shards: ...
    def __getitem__(self, index: int | slice) -> Shard | Shards:
        if isinstance(index, slice):
            return Shards(self._entries[index])
        return Shard(**self._entries[index])


def read_shards(prepare_dir: Path, split: str, index: PrepareIndex | None = None) -> Shards:
    """The shards of a split in their fixed order. Raises UserError when the split holds no samples.

    `index`: what `read_index` returned, to save reading it again.
    """
    splits = (index or read_index(prepare_dir))["splits"]
    if split not in splits:
        raise UserError(f"expected a split among {', '.join(splits)}, found '{split}'")
    shards = Shards(splits[split]["shards"])
    if not shards:
        raise UserError(
            f"{prepare_dir}: the split '{split}' holds no samples: raise prepare.validation_fraction, or add samples"
        )
    return shards


def read_shard(prepare_dir: Path, shard: Shard) -> Iterator[Sample]:
    """The samples of one shard in their fixed order. Raises UserError when the tar is damaged or incomplete."""
    if shard.tar is not None:
        raise UserError(f"{shard.tar} is the user's own tar: its samples are read through the catalog")
    path = Path(prepare_dir) / shard.name
    count, reason = 0, ""
    try:
        with mapped(Path(prepare_dir), shard.name, shard.bytes, shard.sha256) as tar:
            for sample in _samples(_members(tar)):
                count += 1
                yield sample
    except (OSError, ValueError) as error:
        reason = str(error)
    if reason or count != shard.samples:
        found = reason or f"{count} samples"
        raise UserError(f"{path} is damaged: expected {shard.samples} samples, found {found}; run prepare again")


def _samples(members: Iterator[tuple[str, bytes]]) -> Iterator[Sample]:
    """Raises ValueError when the members are not those of whole samples."""
    end = ("", b"")
    name, content = next(members, end)
    while name:
        key = name.removesuffix(".json")
        (image, encoded), (text, caption) = next(members, end), next(members, end)
        if (name, text) != (f"{key}.json", f"{key}.txt") or image not in (f"{key}.{e}" for e in _EXTENSIONS):
            raise ValueError(f"{name}, {image}, {text} where KEY.json, KEY.png, KEY.txt should be")
        meta, (name, content) = content, next(members, end)
        further: tuple[str, ...] = ()
        if name == key + _CAPTIONS:
            further = tuple(json.loads(content)[1:])
            name, content = next(members, end)
        yield Sample(key, encoded, caption.decode(), json.loads(meta), further)


def _members(tar: Sliced) -> Iterator[tuple[str, bytes]]:
    """(name, content) of every member of a tar as `write_shard` writes it, ten times as fast as a reader of any tar.

    Raises ValueError when it is something else.
    """
    at, long_name = 0, b""
    while at < len(tar) and any(header := tar[at : at + _BLOCK]):  # a block of zeros is the end
        size, kind = int(header[124:135], 8), header[156:157]
        content = tar[at + _BLOCK : at + _BLOCK + size]
        if header[257:263] != b"ustar " or kind not in (b"0", b"L") or len(content) != size:
            raise ValueError(f"no member of a shard at byte {at}")
        at += _BLOCK + -(-size // _BLOCK) * _BLOCK
        if kind == b"L":  # GNU's way to have names of more than 100 bytes
            long_name = content.rstrip(b"\0")
            continue
        yield (long_name or header[:100].rstrip(b"\0")).decode(), content
        long_name = b""


def read_samples(prepare_dir: Path, split: str) -> Iterator[Sample]:
    """All samples of a split, shard after shard, in their fixed order."""
    for shard in read_shards(Path(prepare_dir), split):
        yield from read_shard(Path(prepare_dir), shard)
