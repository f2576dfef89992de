"""The catalog of prepared images: keys and captions of any samples, without touching a tar.

    catalog = Catalog(prepare_dir, "train")
    catalog.captions(rows)                  # the first caption of each of these samples
    catalog.rows_of(keys)                   # which samples have these keys
    catalog.samples(rows)                   # with their images: only their own bytes are read, from the tars
    catalog.has_caption("a red heart")      # case and spaces aside

Columns are flat files in `catalog/`, beside the shards, little-endian:

    train.keys, train.captions              UTF-8, one after the other
    train.keys.ends, train.captions.ends    uint64: where each ends
    train.rows                              uint64 [samples]: captions up to each sample and with it; only where there
                                            are several of one
    train.known_keys, train.known_captions  uint64 [n, 2], ascending: hash, and number of the first that has it
    train.number.NAME                       float64 [samples]: a number of KEY.json; not a number where it has none
    train.checksums                         uint32: CRC-32 of each block of 16 KiB of the others, sorted by name

A row is a sample's number in the split. Its image is in the shard that `index.json` counts to, where the shard's
`.index.npy` says. What is read is read by range and checked (`checked_file.py`), so memory does not grow with the
data set.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.core.atomic_io import sha256_file
from pipeline.core.errors import UserError
from pipeline.core.seeds import hash64
from pipeline.data.catalog_columns import (
    FOLDER,
    NUMBER,
    WORD,
    Columns,
    caption_hash,
    columns_of,
    key_hash,
    plain_caption,
    put_together,
)
from pipeline.data.checked_file import BLOCK_BYTES, CheckedFile, MemoryFile, Ranges
from pipeline.data.order import permute
from pipeline.data.remote_file import RemoteFile
from pipeline.data.shard_file import ShardFile
from pipeline.data.shards import PrepareIndex, Sample, Shards, read_index, read_shard
from pipeline.data.stored_image import EXTENSIONS, Cut

log = logging.getLogger(__name__)

Ints = NDArray[np.int64]
Rows = Sequence[int] | Ints

_AT_A_TIME = 10_000  # strings in memory where all are read


class Catalog:
    """The samples of one split. Threads may share it."""

    def __init__(self, prepare_dir: Path, split: str, index: PrepareIndex | None = None) -> None:
        """
        Args:
            prepare_dir: of the stage prepare.
            index: what `read_index` returned, to save reading it again.

        Raises:
            UserError: no finished prepare, no catalog beside its shards, or a damaged one.
        """
        self.directory, self.split = Path(prepare_dir), split
        index = index or read_index(self.directory)
        self.extension = f".{EXTENSIONS[index.get('storage', 'png')]}"  # of the images' files
        self.shards = Shards(index["splits"][split]["shards"])
        self._ends = np.cumsum(self.shards.samples)
        self._files = _opened(self.directory, split, index)
        self.count = self._files["keys.ends"].size // WORD
        self.caption_count = self._files["captions.ends"].size // WORD
        if self.count != index["splits"][split]["samples"]:
            raise UserError(
                f"{self.directory}/catalog: expected {index['splits'][split]['samples']} samples of the split "
                f"'{split}', found {self.count}: run the stage prepare again"
            )

    def __len__(self) -> int:
        return self.count

    def keys(self, rows: Rows) -> list[str]:
        """The key of each of these samples."""
        return self._texts("keys", _ints(rows))

    def captions(self, rows: Rows, which: Ints | None = None) -> list[str]:
        """A caption of each of these samples. `which`: counted from 0 for each; None: the first."""
        rows = _ints(rows)
        if "rows" not in self._files:
            return self._texts("captions", rows)
        first = self._before("rows", rows)
        return self._texts("captions", first if which is None else first + which)

    def caption_counts(self, rows: Rows) -> Ints:
        """int64 [n]: how many captions each of these samples has."""
        rows = _ints(rows)
        if "rows" not in self._files:
            return np.ones(len(rows), np.int64)
        return self._words("rows", rows) - self._before("rows", rows)

    def caption_sample(self, count: int, seed: int) -> Iterator[str]:
        """`count` captions, or all if there are no more: a choice that `seed` fixes, in the order of the split."""
        if count >= self.caption_count:
            chosen = None
        else:
            chosen = np.sort(permute(np.arange(count), self.caption_count, hash64("caption sample", seed)))
        for start in range(0, min(count, self.caption_count), _AT_A_TIME):
            some = np.arange(start, min(start + _AT_A_TIME, count, self.caption_count))
            yield from self._texts("captions", some if chosen is None else chosen[some])

    def rows_of(self, keys: Iterable[str]) -> dict[str, int]:
        """The row of each of these keys that the split has."""
        found = {}
        # In the order of the lookup, so that each block of it is read once.
        for wanted, key in sorted((key_hash(key), key) for key in set(keys)):
            row = self._first_with("known_keys", wanted)
            if row is not None and self.keys([row]) == [key]:
                found[key] = row
        return found

    def has_caption(self, caption: str) -> bool:
        """Whether a sample of the split has this caption, case and spaces aside."""
        number = self._first_with("known_captions", caption_hash(caption))
        if number is None:
            return False
        (found,) = self._texts("captions", _ints([number]))
        return plain_caption(found) == plain_caption(caption)

    def samples(self, rows: Iterable[int]) -> Iterator[Sample]:
        """These samples with their images, without metadata; of the tars, only the bytes of these images are read.

        Raises:
            UserError: a tar is missing or damaged.
        """
        iterator = iter(rows)
        while chunk := list(islice(iterator, 256)):
            keys, captions = self.keys(chunk), self._captions_of(chunk)
            for row, key, own in zip(chunk, keys, captions, strict=True):
                file, within = self._located(row)
                yield Sample(key, file.read(within), own[0], {}, tuple(own[1:]), file.cut(within))

    def image_slices(self, rows: Rows) -> list[tuple[Path | RemoteFile, int, int]]:
        """(tar, first byte, bytes) of the image of each of these samples. Raises UserError as `samples` does."""
        found = []
        for row in _ints(rows).tolist():
            file, within = self._located(row)
            begin, size, _ = file.place(within)
            found.append((file.remote or Path(file.path), begin, size))
        return found

    def cut(self, row: int) -> Cut | None:
        """What is kept of a sample's image, where it stays in the user's tar."""
        file, within = self._located(row)
        return file.cut(within)

    def shard_samples(self, name: str) -> Iterator[Sample]:
        """The samples of the shard `name`, in their order, as `samples` has them."""
        number = next(number for number, shard in enumerate(self.shards) if shard.name == name)
        end = int(self._ends[number])
        return self.samples(range(end - self.shards[number].samples, end))

    def numbers(self) -> list[str]:
        """The names of the numbers that the samples came with."""
        return sorted(name.removeprefix(NUMBER) for name in self._files if name.startswith(NUMBER))

    def number(self, name: str, rows: Rows) -> NDArray[np.float64]:
        """float64 [n]: a number of each of these samples; not a number where a sample came without it."""
        return self._words(NUMBER + name, _ints(rows)).view(np.float64)

    def verify(self) -> None:
        """Read every column. Raises UserError, which names the file, when a byte is not as `prepare` wrote it."""
        for file in self._files.values():
            if isinstance(file, CheckedFile):
                file.verify()

    def _captions_of(self, rows: Rows) -> list[list[str]]:
        """All captions of each of these samples."""
        counts, first = self.caption_counts(rows), _ints(rows)
        if "rows" in self._files:
            first = self._before("rows", first)
        numbers = np.concatenate([np.arange(begin, begin + n) for begin, n in zip(first, counts, strict=True)])
        texts = iter(self._texts("captions", numbers))
        return [list(islice(texts, count)) for count in counts.tolist()]

    def _located(self, row: int) -> tuple[ShardFile, int]:
        """The shard that holds a sample, open, and which of its samples that is."""
        number = int(np.searchsorted(self._ends, row, side="right"))
        opened = self._open  # once: another thread may put another one there
        if opened is None or opened[0] != number:
            shard = self.shards[number]
            opened = self._open = (number, ShardFile(self.directory, shard))
        return opened[1], row - int(self._ends[number] - self.shards[number].samples)

    _open: tuple[int, ShardFile] | None = None  # the shard that was read last: rows mostly come in order

    def _first_with(self, column: str, wanted: int) -> int | None:
        """The number that a lookup has for a hash."""
        file, row_bytes = self._files[column], 2 * WORD

        def hash_at(row: int) -> int:
            return int.from_bytes(file.read(row * row_bytes, WORD), "little")

        rows = range(file.size // row_bytes)
        row = bisect_left(rows, wanted, key=hash_at)
        if row == len(rows) or hash_at(row) != wanted:
            return None
        return int.from_bytes(file.read(row * row_bytes + WORD, WORD), "little")

    def _texts(self, column: str, numbers: Ints) -> list[str]:
        """Strings of a column."""
        begins, ends = self._before(f"{column}.ends", numbers), self._words(f"{column}.ends", numbers)
        file, sizes = self._files[column], (ends - begins).tolist()
        return [file.read(begin, size).decode() for begin, size in zip(begins.tolist(), sizes, strict=True)]

    def _before(self, column: str, numbers: Ints) -> Ints:
        """The word before each of these; 0 before the first."""
        words = self._words(column, np.maximum(numbers - 1, 0))
        words[numbers == 0] = 0
        return words

    def _words(self, column: str, numbers: Ints) -> Ints:
        """int64 [n]: words of 8 bytes of a column; each block of it is read once."""
        file, per_block = self._files[column], BLOCK_BYTES // WORD
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < file.size // WORD:
            raise IndexError(f"{column}: expected numbers below {file.size // WORD}")
        words = np.empty(len(numbers), np.int64)
        order = np.argsort(numbers, kind="stable")
        blocks = numbers[order] // per_block
        borders = np.flatnonzero(np.diff(blocks)) + 1
        for here in np.split(order, borders) if len(order) else []:
            begin = int(numbers[here[0]]) // per_block * BLOCK_BYTES
            block = np.frombuffer(file.read(begin, min(BLOCK_BYTES, file.size - begin)), "<i8")
            words[here] = block[numbers[here] - begin // WORD]
        return words


def prepared_catalog(prepare_dir: Path, split: str) -> Catalog | None:
    """The catalog of a split, where one lies there: an earlier version wrote none, and shards may have gone since."""
    if not (prepare_dir / "index.json").is_file():
        return None
    index = read_index(prepare_dir)
    return Catalog(prepare_dir, split, index) if "catalog" in index else None


def _ints(rows: Rows) -> Ints:
    return np.asarray(rows, dtype=np.int64)


def _opened(directory: Path, split: str, index: PrepareIndex) -> Mapping[str, Ranges]:
    """The columns of a split, by name."""
    if "catalog" not in index:
        return _of_shards(directory, split, index)
    entry, path = index["catalog"][split], directory / FOLDER / f"{split}.checksums"
    if not path.is_file() or sha256_file(path) != entry["sha256"]:
        found = "another one" if path.is_file() else "none"
        raise UserError(
            f"{path} is missing or damaged: expected sha256 {entry['sha256'][:12]}, found {found}: run the stage "
            "prepare again"
        )
    checksums, files, start = np.fromfile(path, "<u4"), dict[str, Ranges](), 0
    for name, size in sorted(entry["bytes"].items()):
        blocks = -(-size // BLOCK_BYTES)
        files[name] = CheckedFile(path.with_name(f"{split}.{name}"), size, checksums[start : start + blocks])
        start += blocks
    return files


def _of_shards(directory: Path, split: str, index: PrepareIndex) -> Mapping[str, Ranges]:
    """The columns of a split of which there is no catalog, from its tars."""
    log.info("%s has no catalog, so its tars are read for captions; one that is prepared anew has it", directory)
    shards = Shards(index["splits"][split]["shards"])
    parts: list[Columns] = [columns_of(read_shard(directory, shard)) for shard in shards]
    files: dict[str, MemoryFile] = {}

    def open_column(name: str) -> MemoryFile:
        return files.setdefault(name, MemoryFile())

    put_together(lambda: iter(parts), open_column)
    return files
