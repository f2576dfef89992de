"""The files of one process in a checkpoint: what is in them, their copy in the host's memory, and how they are written.

files = {"training-00000.safetensors": {"weight:head.weight@0": tensor}, "trainer.json": {"step": 100}}
records = write_files(directory, HostCopy().of(files))
"""

from __future__ import annotations

import hashlib
import heapq
import os
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from pipeline.core.atomic_io import write_json
from pipeline.core.manifest import FileRecord
from pipeline.core.tensor_file import TensorLayout, write_tensors

Files = dict[str, object]  # by name: of .safetensors named tensors, of .json any value, of .pt what torch.save takes


def write_files(directory: Path, files: Files) -> dict[str, FileRecord]:
    """Write files, hash them, and wait until they are on the disk; what was written, by name."""
    return {name: _write(directory / name, content) for name, content in sorted(files.items())}


def _write(path: Path, content: object) -> FileRecord:
    if path.suffix == ".safetensors":
        assert isinstance(content, dict)
        return write_tensors(path, {name: TensorLayout.of(t) for name, t in content.items()}, content.__getitem__)
    if path.suffix == ".json":
        write_json(path, content)
    else:
        torch.save(content, path)
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": digest}


def own_part(count: int, rank: int, ranks: int) -> range:
    """Of `count` things in a row, those of a process: as many as of the others, and its own where each has one."""
    return range(-(-rank * count // ranks), -(-(rank + 1) * count // ranks))


def shares(files: Mapping[str, FileRecord], ranks: int) -> list[dict[str, FileRecord]]:
    """Each process's share of a checkpoint's files, when all look after them: of about as many bytes.

    As far as that goes it is what the process reads itself, so that the file comes over the network once.
    """
    size_of = {name: record.get("bytes", 0) for name, record in files.items()}
    kinds = [list(of_kind) for _, of_kind in groupby(sorted(files), key=lambda name: name.partition("-")[0])]
    average = sum(size_of.values()) / ranks
    found: list[list[str]] = [[] for _ in range(ranks)]
    taken, left = [0] * ranks, []
    for names in sorted(kinds, key=lambda names: -max(size_of[name] for name in names)):
        for rank in range(ranks):
            for name in (names[number] for number in own_part(len(names), rank, ranks)):
                if taken[rank] + size_of[name] / 2 <= average:
                    found[rank].append(name)
                    taken[rank] += size_of[name]
                else:
                    left.append(name)
    least = [(of_rank, rank) for rank, of_rank in enumerate(taken)]
    heapq.heapify(least)
    for name in sorted(left, key=lambda name: -size_of[name]):
        of_rank, rank = least[0]
        heapq.heapreplace(least, (of_rank + size_of[name], rank))
        found[rank].append(name)
    return [{name: files[name] for name in names} for names in found]


class HostCopy:
    """A copy of a process's files in the host's memory, which the training does not change any more.

    The memory is kept for the next copy: asking the system for it takes longer than the copy itself.
    """

    def __init__(self) -> None:
        self._kept: Files = {}

    def of(self, files: Files) -> Files:
        """The copy. It is valid until the next one is made."""
        self._kept = {name: _copied(content, self._kept.get(name)) for name, content in files.items()}
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return self._kept


def _copied(value: object, kept: object) -> object:
    """A copy of a value; of tensors into those at the same place of `kept` where they fit."""
    if isinstance(value, Tensor):
        if not isinstance(kept, Tensor) or (kept.dtype, kept.shape) != (value.dtype, value.shape):
            kept = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        return kept.detach().copy_(value.detach(), non_blocking=True)
    if isinstance(value, Mapping):
        before = kept if isinstance(kept, Mapping) else {}
        return {key: _copied(one, before.get(key)) for key, one in value.items()}
    if isinstance(value, list | tuple):
        former = kept if isinstance(kept, list | tuple) and len(kept) == len(value) else [None] * len(value)
        return type(value)(_copied(one, old) for one, old in zip(value, former, strict=True))
    return value
