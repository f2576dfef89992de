"""Training state on disk in shards that any number of processes can read.

    name, tensors = shards_file("optimizer", [TensorShard("state.exp_avg:head.weight", 4096, values)])
    ShardedState(directory, "optimizer").read_into("state.exp_avg:head.weight", 0, tensor)

Each process writes what it has to `<kind>-<rank>.safetensors`. A key `name@start` holds the elements from `start` on of
the flattened tensor `name`, so a reader assembles whatever range it needs from the files of however many processes
wrote them: no gathering when saving, no conversion when loading, no pickles.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pipeline.core import distributed
from pipeline.core.errors import UserError
from pipeline.core.tensor_file import TensorFile


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


class ShardedState:
    """All processes' shards of one `kind` in a checkpoint, to read from. It holds no values and no open files."""

    def __init__(self, directory: Path, kind: str) -> None:
        self.directory = directory
        self._files: list[TensorFile] = []
        self._index: dict[str, list[tuple[int, int, int]]] = {}  # name -> (start, length, file), sorted
        for path in sorted(directory.glob(f"{kind}-*.safetensors")):
            file = TensorFile(path)
            for key, layout in file.layouts.items():
                name, _, start = key.rpartition("@")
                self._index.setdefault(name, []).append((int(start), layout.elements, len(self._files)))
            self._files.append(file)
        for shards in self._index.values():
            shards.sort()

    @property
    def names(self) -> list[str]:
        """Every tensor of which some elements were written, sorted."""
        return sorted(self._index)

    def dtype(self, name: str) -> torch.dtype:
        """That of a tensor as it was written."""
        first, _, file = self._index[name][0]
        return self._files[file].layouts[f"{name}@{first}"].dtype

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
        shards = self._index.get(name, [])
        at = bisect_right(shards, start, key=lambda shard: shard[0])
        for first, length, file in reversed(shards[:at]):  # the first one, unless processes wrote the same
            if start < first + length:
                count = min(first + length - start, out.numel())
                self._files[file].read_into(f"{name}@{first}", start - first, out[:count])
                return count
        raise UserError(
            f"the checkpoint {self.directory} does not fit: expected element {start} of {name}, found none;"
            f" was it made by another optimizer or version? Remove the folder to start over"
        )
