"""Token arrays: what the transformer trains on, memory-mapped, a set of files for each image shard.

    tokenize/index.json                levels, text length, hashes of the tokenizers, checksums of every file
    tokenize/train/000000.codes.0.npy  [samples, crops, positions] of level 0 (coarsest), uint16 when they fit
    tokenize/train/000000.text.npy     [samples, text length]
    tokenize/train/000000.keys.txt     a key a line

Records are tiny and of fixed length, so they lie in arrays and not in tars: any sample is an address, which makes an
exact global shuffle, and a start at any sample at any number of ranks, one integer (see `sampler.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from pipeline.errors import UserError
from pipeline.files import read_json, sha256_file


@dataclass(frozen=True)
class Level:
    """A grid of codes: `height` x `width` of values below `codebook_size`."""

    height: int
    width: int
    codebook_size: int


def token_dtype(vocabulary: int) -> DTypeLike:
    """The narrowest type for values in [0, vocabulary)."""
    return np.uint16 if vocabulary <= 2**16 else np.uint32


class TokenArrays:
    """The token arrays of one split.

    Attributes:
        levels: list of Level, coarse to fine; also unpackable as (height, width, codebook_size) by `astuple`.
        text_length, text_vocab_size: of the text ids.
        crops: versions of each picture.
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
        self.shards: list[dict[str, Any]] = index["splits"].get(split, {"shards": []})["shards"]
        if not self.shards:
            raise UserError(f"{path}: the split '{split}' holds no samples: raise prepare.validation_fraction")
        self.crops: int = self.shards[0]["crops"]
        self.counts = np.array([shard["samples"] for shard in self.shards], dtype=np.int64)
        self._ends = np.cumsum(self.counts)
        self._mapped = lru_cache(maxsize=8_192)(self._map)

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
        shards = np.searchsorted(self._ends, samples, side="right")
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

    def keys(self, shard: int) -> list[str]:
        """Keys of the samples of a shard, in their order."""
        path = self.directory / str(self.shards[shard]["keys"])
        return path.read_text().splitlines()

    def verify(self) -> None:
        """Read every file and compare its checksum. Raises UserError that names the first damaged file."""
        for shard in self.shards:
            for name, sha256 in shard["sha256"].items():
                path = self.directory / name
                found = sha256_file(path) if path.is_file() else "no file"
                if found != sha256:
                    raise UserError(
                        f"{path} is damaged: expected sha256 {sha256[:12]}, found {found[:12]}: "
                        "remove it and run the stage tokenize again"
                    )

    def _map(self, shard: int) -> list[NDArray[Any]]:
        """Text ids, then the codes of each level."""
        entry = self.shards[shard]
        samples, crops = entry["samples"], entry["crops"]
        shapes = [(samples, self.text_length), *((samples, crops, v.height * v.width) for v in self.levels)]
        arrays = []
        for name, shape in zip([entry["text"], *entry["codes"]], shapes, strict=True):
            path = self.directory / name
            try:
                array = np.load(path, mmap_mode="r")
            except (OSError, ValueError) as error:
                raise UserError(f"{path} is missing or damaged: {error}: run the stage tokenize again") from error
            if array.shape != shape:
                raise UserError(f"{path}: expected an array of shape {shape}, found {array.shape}: run tokenize again")
            arrays.append(array)
        return arrays
