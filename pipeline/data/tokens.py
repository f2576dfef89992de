"""Token arrays: what the transformer trains on, memory-mapped, a set of files for each image shard.

    tokenize/index.json                levels, text length, hashes of the tokenizers, checksums of every file
    tokenize/train/000000.codes.0.npy  [samples, crops, positions] of level 0 (coarsest), uint16 when they fit
    tokenize/train/000000.text.npy     [samples, text length]
    tokenize/train/000000.keys.txt     a key a line
    tokenize/train/000000.captions.txt a caption a line, for BPE dropout

Records are tiny and of fixed length, so they lie in arrays and not in tars: any sample is an address, which makes an
exact global shuffle, and a start at any sample at any number of ranks, one integer (see `sampler.py`).
"""

from __future__ import annotations

import math
import mmap
import os
import resource
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from pipeline.core.atomic_io import read_json, sha256_file
from pipeline.core.errors import UserError
from pipeline.core.level import Level


def token_dtype(vocabulary: int) -> DTypeLike:
    """The narrowest type for values in [0, vocabulary)."""
    return np.uint16 if vocabulary <= 2**16 else np.uint32


def check_arrays(directory: Path, shard: dict[str, Any]) -> None:
    """Read every file of an entry of index.json. Raises UserError that names the first that is not as recorded."""
    for name, sha256 in shard["sha256"].items():
        found = sha256_file(directory / name) if (directory / name).is_file() else "no file"
        if found != sha256:
            raise UserError(
                f"{directory / name} is damaged: expected sha256 {sha256[:12]}, found {found[:12]}: "
                "remove it and run the stage tokenize again (its other shards stay)"
            )


class TokenArrays:
    """The token arrays of one split.

    Attributes:
        levels: list of Level, coarse to fine.
        text_length, text_vocab_size: of the text ids.
        tokenizers: name -> hash of the files of the tokenizer that made them.
        crops: versions of each image.
    """

    def __init__(self, tokenize_dir: Path, split: str) -> None:
        """Raises UserError when there are no arrays, or none of this split."""
        self.directory = Path(tokenize_dir)
        path = self.directory / "index.json"
        if not path.is_file():
            raise UserError(f"expected token arrays with an index at {path}, found none: run the stage tokenize first")
        index: dict[str, Any] = read_json(path)
        self.levels = [Level(**level) for level in index["levels"]]
        self.text_length: int = index["text_length"]
        self.text_vocab_size: int = index["text_vocab_size"]
        self.tokenizers: dict[str, str] = index.get("tokenizers", {})
        self.shards: list[dict[str, Any]] = index["splits"].get(split, {"shards": []})["shards"]
        if not self.shards:
            raise UserError(f"{path}: the split '{split}' holds no samples: raise prepare.validation_fraction")
        self.crops: int = self.shards[0]["crops"]
        self.counts = np.array([shard["samples"] for shard in self.shards], dtype=np.int64)
        self._ends = np.cumsum(self.counts)
        # Each mapped file holds a descriptor. Beyond that, shards take turns: 0.1 ms a sample.
        descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._mapped = lru_cache(maxsize=min(descriptors // 4, 16_384) // (1 + len(self.levels)))(self._map)
        self._lines = lru_cache(maxsize=min(descriptors // 4, 16_384))(self._map_lines)

    def check_made_by(self, hashes: dict[str, str], vocabulary: tuple[Any, ...]) -> None:
        """Raise UserError unless the arrays are these tokenizers' work and fit (text length, text ids, levels)."""
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
        self, samples: NDArray[np.int64], crops: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(text int64 [n, T], codes int64 [n, N]) of these samples and crops; N: all levels, coarse to fine."""
        positions = [level.height * level.width for level in self.levels]
        text = np.empty((len(samples), self.text_length), np.int64)
        codes = np.empty((len(samples), sum(positions)), np.int64)
        shards = self.shard_of(samples)
        rows = samples - (self._ends[shards] - self.counts[shards])
        for shard in np.unique(shards).tolist():
            here = np.flatnonzero(shards == shard)
            arrays = self._mapped(shard)
            text[here] = arrays[0][rows[here]]
            start = 0
            for level, length in enumerate(positions):
                codes[here, start : start + length] = arrays[1 + level][rows[here], crops[here]]
                start += length
        return text, codes

    def shard_of(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """int64 [n]: the shards that hold these samples."""
        return np.searchsorted(self._ends, samples, side="right")

    def keys(self, shard: int) -> list[str]:
        """Keys of the samples of a shard, in their order."""
        path = self.directory / str(self.shards[shard]["keys"])
        return path.read_text().splitlines()

    def captions(self, samples: NDArray[np.int64]) -> list[str]:
        """Captions as they were, but for line breaks, which are spaces. Maps 4 bytes a sample of the shards it meets.

        Raises:
            UserError: the arrays were made by a version that kept none.
        """
        shards = self.shard_of(samples)
        rows = samples - (self._ends[shards] - self.counts[shards])
        found = []
        for shard, row in zip(shards.tolist(), rows.tolist(), strict=True):
            text, ends = self._lines(shard)
            found.append(text[ends[row - 1] + 1 if row else 0 : ends[row]].decode())
        return found

    def _map_lines(self, shard: int) -> tuple[bytes | mmap.mmap, NDArray[Any]]:
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
        if len(ends) != entry["samples"]:
            raise UserError(
                f"{path}: expected {entry['samples']} lines, found {len(ends)}: run the stage tokenize again"
            )
        return text, ends

    def verify(self, shards: Iterable[int] | None = None) -> None:
        """Read every file of these shards (None: of all) and compare its checksum. Raises UserError: check_arrays."""
        for shard in range(len(self.shards)) if shards is None else shards:
            check_arrays(self.directory, self.shards[shard])

    def _map(self, shard: int) -> list[NDArray[Any]]:
        """Text ids, then the codes of each level."""
        entry = self.shards[shard]
        samples, crops = entry["samples"], entry["crops"]
        found = [_mapped(self.directory / entry["text"], (samples, self.text_length), self.text_vocab_size)]
        for name, level in zip(entry["codes"], self.levels, strict=True):
            shape = (samples, crops, level.height * level.width)
            found.append(_mapped(self.directory / name, shape, level.codebook_size))
        return found


def _mapped(path: Path, shape: tuple[int, ...], vocabulary: int) -> NDArray[Any]:
    """As np.load(path, mmap_mode="r") in a fifth of the time, which the first batches of many shards feel.

    Raises UserError when the file is missing, cut, or holds something else.
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
