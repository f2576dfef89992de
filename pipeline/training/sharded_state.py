"""Training state on disk in shards that any number of processes can read.

    write_shards(directory, "optimizer", [TensorShard("state.exp_avg:head.weight", 4096, values)])
    ShardedState(directory, "optimizer").read_into("state.exp_avg:head.weight", 0, tensor)

Each process writes what it has to `<kind>-<rank>.safetensors`. A key `name@start` holds the elements from `start` on of
the flattened tensor `name`, so a reader assembles whatever range it needs from the files of however many processes
wrote them: no gathering when saving, no conversion when loading, no pickles.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline.core import distributed
from pipeline.core.atomic_io import set_mode_by_umask
from pipeline.core.errors import UserError


@dataclass(frozen=True)
class TensorShard:
    """The elements from `start` on of the flattened tensor `name`."""

    name: str
    start: int
    value: Tensor


def write_shards(directory: Path, kind: str, shards: Iterable[TensorShard]) -> None:
    """Write this process's file of `kind`; without shards it is an empty one."""
    tensors = {f"{shard.name}@{shard.start}": shard.value.detach().flatten() for shard in shards}
    path = directory / f"{kind}-{distributed.rank():05d}.safetensors"
    save_file(tensors, path)
    set_mode_by_umask(path)


class ShardedState:
    """All processes' shards of one `kind` in a checkpoint, to read from."""

    def __init__(self, directory: Path, kind: str) -> None:
        self.directory = directory
        self._files: list[safe_open] = []
        self._index: dict[str, list[tuple[int, int, int]]] = {}  # name -> (start, length, file)
        for path in sorted(directory.glob(f"{kind}-*.safetensors")):
            file = safe_open(path, framework="pt")
            for key in file.keys():  # noqa: SIM118 (not a dict)
                name, _, start = key.rpartition("@")
                (length,) = file.get_slice(key).get_shape()
                self._index.setdefault(name, []).append((int(start), length, len(self._files)))
            self._files.append(file)

    @property
    def names(self) -> list[str]:
        """Every tensor of which some elements were written, sorted."""
        return sorted(self._index)

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
        for first, length, file in self._index.get(name, ()):
            if first <= start < first + length:
                count = min(first + length - start, out.numel())
                values = self._files[file].get_slice(f"{name}@{first}")[start - first : start - first + count]
                with torch.no_grad():
                    out[:count].copy_(values)
                return count
        raise UserError(
            f"the checkpoint {self.directory} does not fit: expected element {start} of {name}, found none;"
            f" was it made by another optimizer or version? Remove the folder to start over"
        )
