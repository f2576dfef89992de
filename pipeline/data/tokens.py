"""Token arrays: what the transformer trains on, memory-mapped, one set of files for each image shard.

    tokenize/index.json                levels, text length, hashes of the tokenizers, checksums of every file
    tokenize/train/000000.codes.0.npy  [samples, crops, positions] of level 0 (coarsest), uint16 when they fit
    tokenize/train/000000.text.npy     [captions, text length], as a rule one caption a sample
    tokenize/train/000000.rows.npy     [samples + 1], where some have several: where those of each begin and end
    tokenize/train/000000.keys.txt     one key per line
    tokenize/train/000000.captions.txt one caption per line, for BPE dropout

Records are tiny and of fixed length, so they lie in arrays and not in tars: any sample is an address, which makes an
exact global shuffle, and a start at any sample at any number of ranks, one integer (see `sampler.py`).
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, NotRequired, TypedDict

import numpy as np
from numpy.typing import DTypeLike, NDArray

from pipeline.core.atomic_io import read_json
from pipeline.core.errors import UserError
from pipeline.core.level import Level
from pipeline.core.manifest import FileRecord, first_fault
from pipeline.core.process_limits import open_files

LARGEST_ROW = 2**32  # of captions in a shard
Tokens = NDArray[np.uint16] | NDArray[np.uint32]
Vocabulary = tuple[int, int, list[Level]]  # text length, text ids, levels


class TokenShard(TypedDict):
    """The arrays of an image shard in index.json; names are relative to the stage's directory."""

    text: str
    keys: str
    captions: NotRequired[str]  # missing in arrays of early versions
    rows: NotRequired[str]  # missing: one caption a sample
    text_rows: NotRequired[int]  # captions of all samples; missing: one each
    codes: list[str]  # of each level
    samples: int
    crops: int
    captions_cut: NotRequired[int]
    sha256: dict[str, str]  # by name, of every file


class TokenSplit(TypedDict):
    """A split in index.json."""

    samples: int
    captions_cut: int  # captions longer than the text length
    shards: list[TokenShard]
    sources: NotRequired[list[int]]  # samples of each of several sources, one source after the other


class LevelEntry(TypedDict):
    """A `Level` in index.json."""

    height: int
    width: int
    codebook_size: int


class TokenIndex(TypedDict):
    """index.json of `tokenize`."""

    levels: list[LevelEntry]
    text_length: int
    text_vocab_size: int
    tokenizers: dict[str, str]  # name -> hash of its files
    precision: NotRequired[str]  # of what the codes were made in; older ones do not say
    splits: dict[str, TokenSplit]


def token_dtype(vocabulary: int) -> DTypeLike:
    """The narrowest type for values in [0, vocabulary)."""
    return np.uint16 if vocabulary <= 2**16 else np.uint32


def caption_count(split: TokenSplit) -> int:
    """How many captions a split has; as many as samples, unless `prepare.caption` is random."""
    return sum(shard.get("text_rows", shard["samples"]) for shard in split["shards"])


def array_records(shard: TokenShard) -> dict[str, FileRecord]:
    """What is recorded of each file of a shard, by name."""
    return {name: {"sha256": sha256} for name, sha256 in shard["sha256"].items()}


def check_arrays(directory: Path, shard: TokenShard) -> None:
    """Read every file of a shard. Raises UserError that names the first that is not as recorded."""
    fault = first_fault(directory, array_records(shard))
    if fault:
        raise UserError(
            f"{fault.path} is damaged: expected {fault.expected}, found {fault.found}: "
            "remove it and run the stage tokenize again (its other shards stay)"
        )


class _Arrays(NamedTuple):
    """The arrays of a shard, mapped."""

    text: Tokens  # [captions, text length]
    rows: Tokens | None  # [samples + 1]: the captions of sample i are rows[i] to rows[i + 1]; None: one each
    codes: list[Tokens]  # of each level, [samples, crops, positions]


class TokenArrays:
    """The token arrays of one split.

    Attributes:
        levels: list of Level, coarse to fine.
        text_length, text_vocab_size: of the text ids.
        tokenizers: name -> hash of the files of the tokenizer that made them.
        crops: versions of each image.
        several_captions: of some samples.
    """

    def __init__(self, tokenize_dir: Path, split: str) -> None:
        """Raises UserError when there are no arrays, or none of this split."""
        self.directory = Path(tokenize_dir)
        path = self.directory / "index.json"
        if not path.is_file():
            raise UserError(f"expected token arrays with an index at {path}, found none: run the stage tokenize first")
        index: TokenIndex = read_json(path)
        self.levels = [Level(**level) for level in index["levels"]]
        self.text_length = index["text_length"]
        self.text_vocab_size = index["text_vocab_size"]
        self.tokenizers = index.get("tokenizers", {})
        self.shards = index["splits"][split]["shards"] if split in index["splits"] else []
        if not self.shards:
            raise UserError(f"{path}: the split '{split}' holds no samples: raise prepare.validation_fraction")
        self.crops = self.shards[0]["crops"]
        self.counts = np.array([shard["samples"] for shard in self.shards], dtype=np.int64)
        self._ends = np.cumsum(self.counts)
        # Each mapped file holds a descriptor. Beyond that, shards take turns: 0.1 ms per sample.
        files = min(open_files() // 4, 16_384)
        self.several_captions = any("rows" in shard for shard in self.shards)
        self._mapped = lru_cache(maxsize=files // (1 + self.several_captions + len(self.levels)))(self._map)
        self._lines = lru_cache(maxsize=files)(self._map_lines)

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

    def gather(
        self, samples: NDArray[np.int64], crops: NDArray[np.int64], captions: NDArray[np.int64] | None = None
    ) -> tuple[Tokens, Tokens]:
        """(text [n, T], codes [n, N]) of these samples and crops; N: all levels, coarse to fine.

        `captions`: which one of each sample's, counted from 0; None: the first.

        Each uint16 or uint32, as the files are; codes of all levels as those of the largest codebook.
        """
        positions = [level.positions for level in self.levels]
        text = _empty((len(samples), self.text_length), self.text_vocab_size)
        codes = _empty((len(samples), sum(positions)), max(level.codebook_size for level in self.levels))
        shards = self.shard_of(samples)
        rows = samples - (self._ends[shards] - self.counts[shards])
        for shard in np.unique(shards).tolist():
            here = np.flatnonzero(shards == shard)
            arrays = self._mapped(shard)
            text[here] = arrays.text[_text_rows(arrays, rows[here], None if captions is None else captions[here])]
            start = 0
            for level, length in enumerate(positions):
                codes[here, start : start + length] = arrays.codes[level][rows[here], crops[here]]
                start += length
        return text, codes

    def shard_of(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """int64 [n]: the shards that hold these samples."""
        return np.searchsorted(self._ends, samples, side="right")

    def caption_counts(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """int64 [n]: how many captions each of these samples has."""
        counts = np.ones(len(samples), np.int64)
        shards = self.shard_of(samples)
        for shard in np.unique(shards).tolist():
            here, begin = shards == shard, self._ends[shard] - self.counts[shard]
            first = self._mapped(shard).rows
            if first is not None:
                counts[here] = np.diff(first.astype(np.int64))[samples[here] - begin]
        return counts

    def keys(self, shard: int) -> list[str]:
        """The keys of a shard's samples, in their order."""
        path = self.directory / self.shards[shard]["keys"]
        return path.read_text().splitlines()

    def captions(self, samples: NDArray[np.int64], which: NDArray[np.int64] | None = None) -> list[str]:
        """A caption of each of these samples, with spaces for line breaks. Maps 4 bytes per caption of a shard.

        `which`: counted from 0 for each sample; None: the first.

        Raises:
            UserError: the arrays were made by a version that kept none.
        """
        shards = self.shard_of(samples)
        rows = samples - (self._ends[shards] - self.counts[shards])
        found = []
        if self.several_captions:
            for shard in np.unique(shards).tolist():
                here = shards == shard
                rows[here] = _text_rows(self._mapped(shard), rows[here], None if which is None else which[here])
        for shard, row in zip(shards.tolist(), rows.tolist(), strict=True):
            text, ends = self._lines(shard)
            found.append(text[ends[row - 1] + 1 if row else 0 : ends[row]].decode())
        return found

    def _map_lines(self, shard: int) -> tuple[mmap.mmap, NDArray[np.uint32]]:
        """All captions of a shard, and where each ends."""
        entry = self.shards[shard]
        if "captions" not in entry:
            raise UserError(
                f"{self.directory}: expected captions beside the token arrays, found none: "
                "remove this directory and run the stage tokenize again, or set transformer.bpe_dropout=0"
            )
        path = self.directory / entry["captions"]
        try:
            with open(path, "rb") as file:
                text = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise UserError(f"{path} is missing or damaged: {error}: run the stage tokenize again") from error
        ends = np.flatnonzero(np.frombuffer(text, np.uint8) == ord("\n")).astype(np.uint32)
        expected = entry.get("text_rows", entry["samples"])
        if len(ends) != expected:
            raise UserError(f"{path}: expected {expected} lines, found {len(ends)}: run the stage tokenize again")
        return text, ends

    def verify(self, shards: Iterable[int] | None = None) -> None:
        """Read every file of these shards (None: of all) and compare its checksum.

        Raises:
            UserError: a file is not as recorded; it names the first.
        """
        for shard in range(len(self.shards)) if shards is None else shards:
            check_arrays(self.directory, self.shards[shard])

    def _map(self, shard: int) -> _Arrays:
        entry = self.shards[shard]
        samples, crops = entry["samples"], entry["crops"]
        text_shape = (entry.get("text_rows", samples), self.text_length)
        text = _mapped(self.directory / entry["text"], text_shape, self.text_vocab_size)
        rows = _mapped(self.directory / entry["rows"], (samples + 1,), LARGEST_ROW) if "rows" in entry else None
        codes = [
            _mapped(self.directory / name, (samples, crops, level.positions), level.codebook_size)
            for name, level in zip(entry["codes"], self.levels, strict=True)
        ]
        return _Arrays(text, rows, codes)


def _text_rows(arrays: _Arrays, rows: NDArray[np.int64], which: NDArray[np.int64] | None) -> NDArray[np.int64]:
    """Where in a shard's text a caption of its samples `rows` lies: the one that `which` says, or the first."""
    if arrays.rows is None:
        return rows
    first = arrays.rows[rows].astype(np.int64)
    return first if which is None else first + which


def _empty(shape: tuple[int, ...], vocabulary: int) -> Tokens:
    array: Tokens = np.empty(shape, token_dtype(vocabulary))
    return array


def _mapped(path: Path, shape: tuple[int, ...], vocabulary: int) -> Tokens:
    """The array of a .npy file, as np.load(path, mmap_mode="r") gives it, but in a fifth of the time.

    The first batches of many shards feel that.

    Raises:
        UserError: the file is missing, cut, or holds something else.
    """
    dtype = np.dtype(token_dtype(vocabulary))
    expected = f"'descr': '{dtype.str}', 'fortran_order': False, 'shape': {shape}"
    try:
        with open(path, "rb", buffering=0) as file:
            magic = file.read(10)
            header = file.read(int.from_bytes(magic[8:], "little"))
            begin, size = len(magic) + len(header), os.fstat(file.fileno()).st_size
            if expected.encode() not in header or size != begin + dtype.itemsize * math.prod(shape):
                raise UserError(
                    f"{path} is damaged: expected a .npy file with {expected}, found {size} bytes that begin with "
                    f"{(magic + header)[:100]!r}: remove it and run the stage tokenize again"
                )
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is missing or damaged: {error}: run the stage tokenize again") from error
    if hasattr(mmap, "MADV_RANDOM"):
        content.madvise(mmap.MADV_RANDOM)  # a shuffle wants one record of all that would be read ahead
    return np.frombuffer(content, dtype, math.prod(shape), begin).reshape(shape)
