"""Training state on disk in shards that any number of processes can read.

    name, tensors = shards_file("optimizer", [TensorShard("state.exp_avg:head.weight", 4096, values)])
    ShardedState(directory, "optimizer").read_into("state.exp_avg:head.weight", 0, tensor)

Each process writes what it has to `<kind>-<rank>.safetensors`. A key `name@start` holds the elements from `start` on of
the flattened tensor `name`, so a reader assembles whatever range it needs from the files of however many processes
wrote them: no gathering when saving, no conversion when loading, no pickles. Of hundreds of files each process looks
only at its share, and at those that it reads.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.core import distributed
from pipeline.core.errors import UserError
from pipeline.core.tensor_file import TensorFile
from pipeline.training.checkpoint_files import own_part

_OPEN_FILES = 8
Headers = dict[int, dict[str, int]]  # file -> key -> elements


@dataclass(frozen=True)
class TensorShard:
    """The elements from `start` on of the flattened tensor `name`."""

    name: str
    start: int
    value: Tensor


def shards_file(kind: str, shards: Iterable[TensorShard]) -> tuple[str, dict[str, Tensor]]:
    """The name of this process's file of `kind`, and what belongs in it; without shards nothing."""
    tensors = {f"{shard.name}@{shard.start}": shard.value.detach().flatten() for shard in shards}
    return f"{kind}-{distributed.rank():05d}.safetensors", tensors


class Run(NamedTuple):
    """Shards of one tensor, each of `length` elements, end to end in `files` files of consecutive processes."""

    start: int
    length: int
    first_file: int
    files: int


class ShardedState:
    """All processes' shards of one `kind` in a checkpoint, to read from. It holds no values, and few files open.

    Processes read it together: each looks at its share of the files, tells rank 0 what is in them, and hears what is
    where; then it opens the files that have something for it.
    """

    def __init__(self, directory: Path, kind: str, alone: bool = False) -> None:
        """Collective, unless this process reads `alone`. Raises UserError when a file's header is damaged."""
        self.directory = directory
        self._files: dict[int, TensorFile] = {}
        self._open: dict[int, TensorFile] = {}  # that used last is last
        rank, ranks = (0, 1) if alone else (distributed.rank(), distributed.world_size())
        names = sorted(path.name for path in directory.glob(f"{kind}-*.safetensors")) if rank == 0 else []
        self._names = names if alone else distributed.broadcast_object(names)
        own = self._headers(own_part(len(self._names), rank, ranks))
        if alone:
            index = _index([own])
        else:
            found = distributed.gather_objects(own)
            index = distributed.broadcast_object(_index(found) if rank == 0 else {})
        if isinstance(index, UserError):
            raise index
        self._index = index

    @property
    def names(self) -> list[str]:
        """Every tensor of which some elements were written, sorted."""
        return sorted(self._index)

    def dtype(self, name: str) -> torch.dtype:
        """That of a tensor as it was written."""
        first = self._index[name][0]
        return self._file(first.first_file).layouts[f"{name}@{first.start}"].dtype

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Read the elements of `name` from `start` on into the flat tensor `out`, as many as it has.

        Raises:
            UserError: no process wrote some of them.
        """
        done = 0
        while done < out.numel():
            done += self._read_from_one_file(name, start + done, out[done:])

    def _read_from_one_file(self, name: str, start: int, out: Tensor) -> int:
        """Read as many elements as the file with element `start` has of them; returns how many."""
        runs = self._index.get(name, [])
        at = bisect_right(runs, start, key=lambda run: run.start)
        for run in reversed(runs[:at]):  # the first one, unless processes wrote the same
            if start < run.start + run.length * run.files:
                number = (start - run.start) // run.length
                first = run.start + number * run.length
                count = min(first + run.length - start, out.numel())
                self._file(run.first_file + number).read_into(f"{name}@{first}", start - first, out[:count])
                return count
        raise UserError(
            f"the checkpoint {self.directory} does not fit: expected element {start} of {name}, found none;"
            f" was it made by another optimizer or version? Remove the folder to start over"
        )

    def _file(self, number: int) -> TensorFile:
        """A file with its header; of all files that were read from, the latest few stay open."""
        if number not in self._files:
            self._files[number] = TensorFile(self.directory / self._names[number])
        self._open.pop(number, None)
        self._open[number] = self._files[number]
        if len(self._open) > _OPEN_FILES:
            self._open.pop(next(iter(self._open))).close()
        return self._files[number]

    def _headers(self, numbers: Iterable[int]) -> Headers | UserError:
        try:
            return {number: {key: of.elements for key, of in self._file(number).layouts.items()} for number in numbers}
        except UserError as error:
            return error


def _index(headers: Iterable[Headers | UserError]) -> dict[str, list[Run]] | UserError:
    """What lies where, by name; or what is wrong with a header."""
    shards: dict[str, list[tuple[int, int, int]]] = {}  # name -> (start, length, file)
    for of_rank in headers:
        if isinstance(of_rank, UserError):
            return of_rank
        for file, lengths in of_rank.items():
            for key, length in lengths.items():
                name, _, start = key.rpartition("@")
                shards.setdefault(name, []).append((int(start), length, file))
    return {name: _runs(sorted(found)) for name, found in shards.items()}


def _runs(shards: Iterable[tuple[int, int, int]]) -> list[Run]:
    """(Start, length, file) of all shards of a tensor: ZeRO-3's, of each process, are one or two runs."""
    runs: list[Run] = []
    for start, length, file in shards:
        last = runs[-1] if runs else Run(-1, -1, -1, 0)
        end = last.start + last.files * last.length
        if 0 < length == last.length and (start, file) == (end, last.first_file + last.files):
            runs[-1] = last._replace(files=last.files + 1)
        else:
            runs.append(Run(start, length, file, 1))
    return runs
