"""Token arrays: what the transformer trains on, memory-mapped, in at most 512 files of each split.

    tokenize/index.json             levels, text length, hashes of the tokenizers, SHA-256 of the records
    tokenize/train.shards           a record of each image shard's block (`token_blocks.py`), with its SHA-256
    tokenize/train/000.tokens       blocks end to end: text ids, codes, keys and captions of a shard after the other's
    tokenize/train/000.journal      by which a task that was killed finds what it had done (`token_parts.py`)

Records of samples are tiny and of fixed length, so they lie in arrays and not in tars: any sample is an address, which
makes an exact global shuffle, and a start at any sample at any number of ranks, one integer (see `sampler.py`).
"""

from __future__ import annotations

import hashlib
import mmap
import os
import time
from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np
from numpy.typing import NDArray

from pipeline.core.atomic_io import read_json, write_atomic
from pipeline.core.errors import UserError
from pipeline.core.level import Level
from pipeline.core.process_limits import open_files
from pipeline.data.block_cache import Block
from pipeline.data.opened_file import Sliced, remote
from pipeline.data.remote_file import BLOCK_BYTES, RemoteFile
from pipeline.data.token_blocks import RECORD, Records, Shape, token_dtype
from pipeline.data.token_parts import check_size, damage, damage_elsewhere, part_file, part_name

_BLOCKS_OF_A_FILE = 1 << 32  # more than there are
FORMAT = 2  # of the files; 1 had five of each image shard
Ints = NDArray[np.int64]
Tokens = NDArray[np.uint16] | NDArray[np.uint32]
Vocabulary = tuple[int, int, list[Level]]  # text length, text ids, levels


class TokenSplit(TypedDict):
    """A split in index.json."""

    samples: int
    captions: int  # of all samples
    captions_cut: int  # longer than the text length
    crops: int  # versions of each image
    shards: int
    bytes: int  # of all blocks
    sha256: str  # of the file of records
    sources: NotRequired[list[int]]  # samples of each of several sources, one source after the other


class LevelEntry(TypedDict):
    """A `Level` in index.json."""

    height: int
    width: int
    codebook_size: int


class TokenIndex(TypedDict):
    """index.json of `tokenize`."""

    format: int
    levels: list[LevelEntry]
    text_length: int
    text_vocab_size: int
    tokenizers: dict[str, str]  # name -> hash of its files
    precision: NotRequired[str]  # of what the codes were made in; older ones do not say
    splits: dict[str, TokenSplit]


def read_token_index(tokenize_dir: Path) -> TokenIndex:
    """The index.json of a finished `tokenize`. Raises UserError when there is none, or one of an earlier format."""
    path = tokenize_dir / "index.json"
    if not path.is_file():
        raise UserError(f"expected token arrays with an index at {path}, found none: run the stage tokenize first")
    index: TokenIndex = read_json(path)
    if index.get("format") != FORMAT:
        raise UserError(
            f"{path}: expected token arrays of format {FORMAT}, found those of another version: remove "
            f"{tokenize_dir / '_SUCCESS'} and run the stage tokenize again"
        )
    return index


def records_path(tokenize_dir: Path, split: str) -> Path:
    """The file of a split's records."""
    return tokenize_dir / f"{split}.shards"


def write_records(tokenize_dir: Path, split: str, parts: Sequence[Records], crops: int) -> TokenSplit:
    """Write the records of a split's parts; what index.json says of them."""
    records = np.concatenate([np.empty(0, RECORD), *parts])
    content = records.tobytes()
    write_atomic(records_path(tokenize_dir, split), content)
    totals = {name: int(records[name].sum(dtype=np.int64)) for name in ("samples", "captions", "captions_cut", "bytes")}
    return {
        "samples": totals["samples"],
        "captions": totals["captions"],
        "captions_cut": totals["captions_cut"],
        "crops": crops,
        "shards": len(records),
        "bytes": totals["bytes"],
        "sha256": hashlib.sha256(content).hexdigest(),
    }


def _read_records(tokenize_dir: Path, split: str, entry: TokenSplit) -> Records:
    path = records_path(tokenize_dir, split)
    content = path.read_bytes() if path.is_file() else b""
    if (found := hashlib.sha256(content).hexdigest()) != entry["sha256"]:
        raise UserError(
            f"{path} is missing or damaged: expected sha256 {entry['sha256'][:12]}, found {found[:12]}: remove "
            f"{tokenize_dir / '_SUCCESS'} and run the stage tokenize again"
        )
    records: Records = np.frombuffer(content, RECORD)
    return records


def split_parts(tokenize_dir: Path, split: str, index: TokenIndex) -> list[Records]:
    """The records of each of a split's files."""
    records = _read_records(tokenize_dir, split, index["splits"][split])
    return np.split(records, np.flatnonzero(np.diff(records["part"].astype(np.int64))) + 1)


class TokenArrays:
    """The token arrays of one split.

    Attributes:
        levels: list of Level, coarse to fine.
        text_length, text_vocab_size: of the text ids.
        tokenizers: name -> hash of the files of the tokenizer that made them.
        crops: versions of each image.
        bytes: of all files.
        several_captions: of some samples.
        shards: how many image shards they were made from.
    """

    def __init__(self, tokenize_dir: Path, split: str) -> None:
        """Raises UserError when there are no arrays, or none of this split."""
        self.directory, self.split = Path(tokenize_dir), split
        index = read_token_index(self.directory)
        self.levels = [Level(**level) for level in index["levels"]]
        self.text_length = index["text_length"]
        self.text_vocab_size = index["text_vocab_size"]
        self.tokenizers = index["tokenizers"]
        if split not in index["splits"] or not index["splits"][split]["samples"]:
            path = self.directory / "index.json"
            raise UserError(f"{path}: the split '{split}' holds no samples: raise prepare.validation_fraction")
        entry = index["splits"][split]
        self.crops = entry["crops"]
        self.bytes = entry["bytes"]
        self.several_captions = entry["captions"] != entry["samples"]
        self._records = _read_records(self.directory, split, entry)
        self.shards = len(self._records)
        self._counts = self._records["samples"].astype(np.int64)
        self._ends = np.cumsum(self._counts)
        self._begins = self._records["begin"].astype(np.int64)
        shape = Shape(self.text_length, self.text_vocab_size, tuple(self.levels), self.crops)
        self._sections = shape.sections(self._records)
        self._parts = self._records["part"].astype(np.int64)
        self._blocks: dict[int, Block] = {}  # of files in object stores, used within the last second
        self._looked = 0.0
        # Each mapped file holds a descriptor. With a low limit, files take turns.
        self._mapped = lru_cache(maxsize=max(1, open_files() // 4))(self._map)

    def check_made_by(self, hashes: dict[str, str], vocabulary: Vocabulary) -> None:
        """Raises UserError unless the arrays are these tokenizers' work and of this vocabulary."""
        for name, expected in hashes.items():
            if (found := self.tokenizers.get(name)) != expected:
                raise UserError(
                    f"{self.directory}: expected token arrays of the {name} {expected[:12]}, found those of "
                    f"{found[:12] if found else 'an unknown one'}: run the stage tokenize again"
                )
        own = (self.text_length, self.text_vocab_size, self.levels)
        if own != vocabulary:
            raise UserError(
                f"{self.directory}: expected token arrays for (text length, text ids, levels) {vocabulary}, "
                f"found {own}: run the stage tokenize again"
            )

    def __len__(self) -> int:
        """Samples of the split."""
        return int(self._ends[-1])

    @cached_property
    def lie_elsewhere(self) -> bool:
        """Whether the first or the last of their files lies in an object store."""
        return any(isinstance(self._mapped(int(part)), RemoteFile) for part in np.unique(self._parts[[0, -1]]))

    def gather(self, samples: Ints, crops: Ints, captions: Ints | None = None) -> tuple[Tokens, Tokens]:
        """(text [n, T], codes [n, N]) of these samples and crops; N: all levels, coarse to fine.

        `captions`: which one of each sample's, counted from 0; None: the first.

        Each uint16 or uint32, as the files are; codes of all levels as those of the largest codebook.
        """
        shards, rows = self._located(samples)
        text_rows = self._text_rows(shards, rows, captions)
        text = self._read("text", shards, text_rows, self.text_length, self.text_vocab_size)
        largest = max(level.codebook_size for level in self.levels)
        codes: Tokens = np.empty((len(samples), sum(level.positions for level in self.levels)), token_dtype(largest))
        start = 0
        for number, level in enumerate(self.levels):
            versions = rows * self.crops + crops
            codes[:, start : start + level.positions] = self._read(
                f"codes.{number}", shards, versions, level.positions, level.codebook_size
            )
            start += level.positions
        return text, codes

    def shard_of(self, samples: Ints) -> Ints:
        """int64 [n]: the shards that hold these samples."""
        return np.searchsorted(self._ends, samples, side="right")

    def caption_counts(self, samples: Ints) -> Ints:
        """int64 [n]: how many captions each of these samples has."""
        shards, rows = self._located(samples)
        counts = np.ones(len(samples), np.int64)
        several = self._have_several(shards)
        shards, rows = shards[several], rows[several]
        counts[several] = self._words("rows", shards, rows + 1) - self._words("rows", shards, rows)
        return counts

    def blocks(self, samples: Ints, texts: bool) -> list[tuple[RemoteFile, int]]:
        """The blocks of object stores that hold the arrays of these samples, each once; `texts`: captions, too.

        Where samples have several captions, or captions several lengths, about those: what is missing is read then.
        """
        shards, rows = self._located(samples)
        names = list(self._sections)
        wanted = ["text", *(f"codes.{number}" for number in range(len(self.levels)))]
        wanted += ["rows"] * self.several_captions + ["caption_ends", "captions"] * texts
        found = []
        for name in wanted:
            begin, end = (self._sections[n][shards] for n in (name, names[names.index(name) + 1]))
            within = self._begins[shards] + begin + rows * (end - begin) // self._counts[shards]
            found += [within, within + (end - begin) // self._counts[shards]]
        pairs = np.unique(self._parts[shards] * _BLOCKS_OF_A_FILE + np.stack(found) // BLOCK_BYTES).tolist()
        files = [(self._mapped(pair // _BLOCKS_OF_A_FILE), pair % _BLOCKS_OF_A_FILE) for pair in pairs]
        return [(file, n) for file, n in files if isinstance(file, RemoteFile) and n * BLOCK_BYTES < file.size]

    def keys(self, samples: Ints) -> list[str]:
        """The key of each of these samples."""
        return self._strings("keys", *self._located(samples))

    def captions(self, samples: Ints, which: Ints | None = None) -> list[str]:
        """A caption of each of these samples, with spaces for line breaks.

        `which`: counted from 0 for each sample; None: the first.
        """
        shards, rows = self._located(samples)
        return self._strings("captions", shards, self._text_rows(shards, rows, which))

    def verify(self, shards: Iterable[int] | None = None) -> None:
        """Read the blocks of these image shards (None: of all) and compare their checksums.

        Raises:
            UserError: a block is not as recorded; it names the file of the first.
        """
        for shard in range(self.shards) if shards is None else shards:
            part, record = int(self._parts[shard]), self._records[shard]
            path = self.directory / part_name(self.split, part)
            if (file := self._remote(part)) is not None:
                fault = damage_elsewhere(file, record)
            else:
                fault = damage(path, self._records[shard : shard + 1])
            if fault:
                raise UserError(f"{fault}: remove it and run the stage tokenize again (its other files stay)")

    def _located(self, samples: Ints) -> tuple[Ints, Ints]:
        """The shard that holds each of these samples, and which of its samples that is."""
        shards = self.shard_of(samples)
        return shards, samples - (self._ends[shards] - self._counts[shards])

    def _have_several(self, shards: Ints) -> NDArray[np.bool_]:
        return self._records["captions"][shards] != self._records["samples"][shards]

    def _text_rows(self, shards: Ints, rows: Ints, which: Ints | None) -> Ints:
        """Where in its shard's text the caption lies that `which` says, or the first."""
        several = self._have_several(shards)
        if not several.any():
            return rows
        first = rows.copy()
        first[several] = self._words("rows", shards[several], rows[several])
        return first if which is None else first + which

    def _read(self, section: str, shards: Ints, rows: Ints, length: int, vocabulary: int) -> Tokens:
        """[n, length] of a section whose rows are of this length."""
        dtype: np.dtype[Any] = np.dtype(token_dtype(vocabulary))
        width = length * dtype.itemsize
        begins = self._begins[shards] + self._sections[section][shards] + rows * width
        found: Tokens = np.empty((len(rows), length), dtype)
        parts = self._parts[shards]
        if self.lie_elsewhere:
            self._read_elsewhere(found, dtype, parts, begins)
            return found
        for number, (part, begin) in enumerate(zip(parts.tolist(), begins.tolist(), strict=True)):
            file = self._mapped(part)
            if isinstance(file, RemoteFile):
                found[number] = np.frombuffer(file.read(begin, width), dtype)
            else:
                found[number] = np.frombuffer(file, dtype, length, begin)
        return found

    def _read_elsewhere(self, found: Tokens, dtype: np.dtype[Any], parts: Ints, begins: Ints) -> None:
        """Rows of files of which some lie in an object store; blocks are looked up once a second, not for each row."""
        if (now := time.monotonic()) - self._looked > 1.0:
            self._blocks.clear()
            self._looked = now
        length, width = found.shape[1], found.shape[1] * dtype.itemsize
        numbers, starts = np.divmod(begins, BLOCK_BYTES)
        names = parts * _BLOCKS_OF_A_FILE + numbers
        for row, (name, start, part) in enumerate(zip(names.tolist(), starts.tolist(), parts.tolist(), strict=True)):
            block = self._blocks.get(name)
            if block is None:
                file = self._mapped(part)
                block = file.block(name % _BLOCKS_OF_A_FILE) if isinstance(file, RemoteFile) else None
                if block is not None:
                    self._blocks[name] = block
            if block is None or start + width > BLOCK_BYTES:
                begin = int(begins[row])
                found[row] = np.frombuffer(self._mapped(part)[begin : begin + width], dtype)
            else:
                found[row] = np.frombuffer(block, dtype, length, start)

    def _words(self, section: str, shards: Ints, rows: Ints) -> Ints:
        """int64 [n]: one number each of a section."""
        return self._read(section, shards, rows, 1, 2**32)[:, 0].astype(np.int64)

    def _strings(self, section: str, shards: Ints, rows: Ints) -> list[str]:
        name = f"{section[:-1]}_ends"
        begins = self._words(name, shards, np.maximum(rows - 1, 0))
        begins[rows == 0] = 0
        ends, texts = self._words(name, shards, rows), self._begins[shards] + self._sections[section][shards]
        where = zip(self._parts[shards].tolist(), (texts + begins).tolist(), (texts + ends).tolist(), strict=True)
        return [self._mapped(part)[begin:end].decode() for part, begin, end in where]

    def _remote(self, part: int) -> RemoteFile | None:
        """A file of blocks in the object store that it was pushed to; None: it lies here."""
        first, end = np.searchsorted(self._parts, [part, part + 1])
        name, size, content = part_file(self.split, self._records[first:end])
        return remote(self.directory, name, size, content)

    def _map(self, part: int) -> Sliced:
        """A file of blocks. Raises UserError when it is missing or of another size."""
        if (found := self._remote(part)) is not None:
            return found
        path = self.directory / part_name(self.split, part)
        last = np.searchsorted(self._parts, part, side="right") - 1
        check_size(path, int(self._records[last]["begin"] + self._records[last]["bytes"]))
        descriptor = os.open(path, os.O_RDONLY)
        try:
            content = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
        finally:
            os.close(descriptor)
        if hasattr(mmap, "MADV_RANDOM"):
            content.madvise(mmap.MADV_RANDOM)  # a shuffle wants one record of all that would be read ahead
        return content
