"""Training state on disk in pieces that any number of processes can read.

    write_shards(directory, "optimizer", [TensorShard("state.exp_avg:head.weight", 4096, values)])
    ShardedState(directory, "optimizer").fill("state.exp_avg:head.weight", 0, tensor)

Each process writes the part that it holds to `<what>-<rank>.safetensors`. A key `name@start` holds the elements from
`start` on of the flattened tensor `name`, so a reader puts together whatever part it needs from the files of however
many processes wrote them: no gathering when saving, no conversion when loading, no pickles.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline.core import distributed
from pipeline.core.errors import UserError


@dataclass(frozen=True)
class TensorShard:
    """The elements from `start` on of the flattened tensor `name`."""

    name: str
    start: int
    value: Tensor


def write_shards(directory: Path, what: str, pieces: Iterable[TensorShard]) -> None:
    """This process's file; a process without pieces writes an empty one."""
    tensors = {f"{piece.name}@{piece.start}": piece.value.detach().flatten() for piece in pieces}
    save_file(tensors, directory / f"{what}-{distributed.rank():05d}.safetensors")


class ShardedState:
    """What all processes wrote under one `what`."""

    def __init__(self, directory: Path, what: str) -> None:
        self.directory = directory
        self._files: list[Any] = []
        self._index: dict[str, list[tuple[int, int, int]]] = {}  # name -> (start, length, file)
        for path in sorted(directory.glob(f"{what}-*.safetensors")):
            file: Any = safe_open(path, framework="pt")
            for key in file.keys():  # noqa: SIM118 (not a dict)
                name, _, start = key.rpartition("@")
                (length,) = file.get_slice(key).get_shape()
                self._index.setdefault(name, []).append((int(start), length, len(self._files)))
            self._files.append(file)

    @property
    def names(self) -> list[str]:
        return sorted(self._index)

    def fill(self, name: str, start: int, out: Tensor) -> None:
        """Read the elements from `start` on into the flat tensor `out`.

        Raises:
            UserError: no process wrote some of them.
        """
        done = 0
        while done < out.numel():
            done += self._read_some(name, start + done, out[done:])

    def _read_some(self, name: str, start: int, out: Tensor) -> int:
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
