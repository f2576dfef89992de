"""A safetensors file, a tensor at a time: written and hashed in one pass, read into memory that is there already.

    record = write_tensors(path, {"w": TensorLayout(torch.float32, (4, 8))}, tensors.__getitem__)
    TensorFile(path).read_into("w", 8, out)     # the elements from 8 on of the flattened tensor, as many as `out` has

The safetensors package writes what is in memory all at once, and maps what it reads. The bytes are the same as its own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from pipeline.core.atomic_io import fill, set_mode_by_umask
from pipeline.core.errors import UserError
from pipeline.core.manifest import BLOCK_BYTES, FileRecord, Hashed

_NAMES = {  # in the order in which the format has them: the widest alignment first
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_ORDER = {dtype: number for number, dtype in enumerate(_NAMES)}
_CHUNK = 1 << 24  # bytes that are hashed, and written while the processor's cache has them
_LONGEST_HEADER = 100_000_000  # bytes; the format's own limit


@dataclass(frozen=True)
class TensorLayout:
    """What a file's header says of a tensor before its values are known."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> TensorLayout:
        """That of a tensor."""
        return cls(tensor.dtype, tuple(tensor.shape))

    @property
    def exported(self) -> TensorLayout:
        """In a model's folder, where all floating-point numbers are float32."""
        return TensorLayout(torch.float32, self.shape) if self.dtype.is_floating_point else self

    @property
    def elements(self) -> int:
        """How many numbers."""
        return prod(self.shape)

    @property
    def size(self) -> int:
        """Bytes."""
        return self.elements * self.dtype.itemsize


def write_tensors(
    path: Path,
    layouts: Mapping[str, TensorLayout],
    tensor_of: Callable[[str], Tensor],
    block_bytes: int = BLOCK_BYTES,
) -> FileRecord:
    """Write a file and wait until it is on the disk; what was written, hashed on the way.

    Args:
        tensor_of: gives the tensor of a name, on any device. Called once for each, in the file's order; no other tensor
            is held meanwhile.
        block_bytes: of which a hash each is recorded, where the file has more.
    """
    names = _in_order(layouts)
    hashed = Hashed(block_bytes)
    with open(path, "wb", buffering=0) as file:
        _append(file.fileno(), memoryview(_header(names, layouts)), hashed)
        for name in names:
            _append(file.fileno(), _bytes_of(tensor_of(name), layouts[name], name), hashed)
        os.fsync(file.fileno())
    set_mode_by_umask(path)
    return hashed.record()


class TensorFile:
    """A file's header, read when made; its values are read when asked for, without mapping the file.

    It is open until `close`, after which it opens again where more is read.
    """

    def __init__(self, path: Path) -> None:
        """Raises UserError when the file's header is damaged."""
        self.path = path
        self._open: FileIO | None = None
        self.layouts: dict[str, TensorLayout] = {}
        self._starts: dict[str, int] = {}  # of each tensor's bytes in the file
        try:
            self._open = FileIO(path)
            length = int.from_bytes(_read(self._open, 8), "little")
            header = json.loads(_read(self._open, min(length, _LONGEST_HEADER)))
            for name, entry in header.items():
                if name != "__metadata__":
                    self.layouts[name] = TensorLayout(_DTYPES[entry["dtype"]], tuple(entry["shape"]))
                    self._starts[name] = 8 + length + entry["data_offsets"][0]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is damaged: expected a safetensors file ({error}); restore it") from error

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Read elements of the flattened tensor `name`, from `start` on, into the flat tensor `out`, cast to its dtype.

        Raises:
            UserError: the file ends before them.
        """
        dtype = self.layouts[name].dtype
        direct = out.dtype == dtype and out.device.type == "cpu" and out.is_contiguous()
        values = out.detach() if direct else torch.empty(out.numel(), dtype=dtype)
        self._open = self._open or FileIO(self.path)
        self._open.seek(self._starts[name] + start * dtype.itemsize)
        memory = _memory(values)
        if fill(self._open, memory) < len(memory):
            raise UserError(f"{self.path} is damaged: expected all of {name}, found the end; restore it")
        if not direct:
            with torch.no_grad():
                out.copy_(values)

    def close(self) -> None:
        """Close the file, if it is open."""
        if self._open:
            self._open.close()
        self._open = None

    def __del__(self) -> None:
        self.close()


def _read(file: FileIO, size: int) -> bytes:
    """As many of the next bytes as there are."""
    data = bytearray(size)
    return bytes(memoryview(data)[: fill(file, memoryview(data))])


def _in_order(layouts: Mapping[str, TensorLayout]) -> list[str]:
    return sorted(layouts, key=lambda name: (_ORDER[layouts[name].dtype], name))


def _header(names: Sequence[str], layouts: Mapping[str, TensorLayout]) -> bytes:
    entries, offset = {}, 0
    for name in names:
        layout = layouts[name]
        end = offset + layout.size
        entries[name] = {"dtype": _NAMES[layout.dtype], "shape": list(layout.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes_of(tensor: Tensor, layout: TensorLayout, name: str) -> memoryview:
    if TensorLayout.of(tensor) != layout:
        raise ValueError(f"{name}: expected {layout}, found {TensorLayout.of(tensor)}")
    flat = tensor.detach().cpu().contiguous().view(-1)
    return _memory(flat)


def _memory(flat: Tensor) -> memoryview:
    """The bytes of a flat tensor on the CPU, not copied."""
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def _append(descriptor: int, data: memoryview, hashed: Hashed) -> None:
    """Write and hash some bytes."""
    for start in range(0, len(data), _CHUNK):
        part = data[start : start + _CHUNK]
        hashed.update(part)
        while part:
            part = part[os.write(descriptor, part) :]
