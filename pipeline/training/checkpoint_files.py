"""The files of one process in a checkpoint: what is in them, their copy in the host's memory, and how they are written.

files = {"training-00000.safetensors": {"weight:head.weight@0": tensor}, "trainer.json": {"step": 100}}
records = write_files(directory, HostCopy().of(files))
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from pipeline.core.atomic_io import write_json
from pipeline.core.manifest import FileRecord, Hashed
from pipeline.core.tensor_file import TensorLayout, write_tensors

_CHUNK = 1 << 24  # bytes that are read at a time
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
        with open(path, "wb") as written:  # given a path, torch writes in C++, which hides why the disk refuses
            torch.save(content, written)
    hashed = Hashed()
    with open(path, "rb", buffering=0) as file:
        while data := file.read(_CHUNK):
            hashed.update(memoryview(data))
        os.fsync(file.fileno())
    return hashed.record()


def own_part(count: int, rank: int, ranks: int) -> range:
    """Of `count` things in a row, those of a process: as many as of the others, and its own where each has one."""
    return range(-(-rank * count // ranks), -(-(rank + 1) * count // ranks))


def shares(files: Mapping[str, FileRecord], ranks: int) -> list[dict[str, FileRecord]]:
    """Each process's share of a checkpoint's files, when all look after them: of as many bytes, to a block.

    The files of all kinds lie side by side, and each process has a part of that row. As far as that goes it is what the
    process reads itself, so that a block comes over the network once.
    """
    kind_of = {name: name.partition("-")[0] for name in files}
    of_kind = Counter[str]()
    for name, recorded in files.items():
        of_kind[kind_of[name]] += recorded.get("bytes", 0)
    row, before = [], Counter[str]()
    for name in sorted(files):
        for size, part in _parts(files[name]):
            where = (before[kind_of[name]] + size / 2) / max(of_kind[kind_of[name]], 1)
            before[kind_of[name]] += size
            row.append((where, name, size, part))
    row.sort(key=lambda entry: entry[:2])
    found: list[dict[str, FileRecord]] = [{} for _ in range(ranks)]
    done, total = 0, max(sum(of_kind.values()), 1)
    for _, name, size, part in row:
        own = found[min(int((done + size / 2) * ranks / total), ranks - 1)]
        done += size
        if name in own:
            own[name]["blocks"] += part["blocks"]
        else:
            own[name] = part
    return found


def _parts(recorded: FileRecord) -> Iterator[tuple[int, FileRecord]]:
    """What can be looked at alone, a file or a block: its bytes, and the record of it."""
    size = recorded.get("bytes", 0)
    if "blocks" not in recorded:
        yield size, recorded
        return
    for start, sha256 in recorded["blocks"]:
        yield min(recorded["block_bytes"], size - start), {**recorded, "blocks": [(start, sha256)]}


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
