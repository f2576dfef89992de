"""A block: the token arrays of one image shard, as they lie in a file, and the record that vouches for it.

Sections one after the other, each at a multiple of 8 bytes, little-endian:

    text            [captions, text length]         uint16 where all ids fit, else uint32
    codes of a level, coarse to fine
                    [samples, crops, positions]     likewise
    rows            [samples + 1] uint32            only where a sample has several captions: where those of each begin
    key_ends        [samples] uint32                where each key ends
    caption_ends    [captions] uint32               likewise
    keys, captions  UTF-8, end to end; of captions, with spaces for line breaks

Where a section begins follows from the record and the shape of the arrays, so any sample is an address.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import DTypeLike, NDArray

from pipeline.core.errors import UserError
from pipeline.core.level import Level

Array = NDArray[np.integer]
Records = NDArray[np.void]  # of RECORD

_ALIGNMENT = 8
_LARGEST = 2**32  # of keys, captions and rows of a block
RECORD = np.dtype(
    [
        ("begin", "<u8"),  # in its file
        ("bytes", "<u8"),
        ("samples", "<u4"),
        ("captions", "<u4"),  # of all samples
        ("captions_cut", "<u4"),  # longer than the text length
        ("key_bytes", "<u4"),
        ("caption_bytes", "<u4"),
        ("part", "<u4"),  # number of its file
        ("sha256", "V32"),
    ]
)


@dataclass(frozen=True)
class Shape:
    """What the arrays of all blocks of a split have in common."""

    text_length: int
    text_vocab_size: int
    levels: tuple[Level, ...]
    crops: int  # versions of each image

    def sections(self, records: Records) -> dict[str, NDArray[np.int64]]:
        """Where each section of each block begins, counted from the block's; "end": the bytes of the block."""
        samples, captions = (records[name].astype(np.int64) for name in ("samples", "captions"))
        sizes = {"text": captions * self.text_length * _dtype(self.text_vocab_size).itemsize}
        for number, level in enumerate(self.levels):
            width = self.crops * level.positions * _dtype(level.codebook_size).itemsize
            sizes[f"codes.{number}"] = samples * width
        sizes["rows"] = np.where(captions != samples, 4 * (samples + 1), 0)
        sizes |= {"key_ends": 4 * samples, "caption_ends": 4 * captions}
        sizes |= {name: records[f"{name[:-1]}_bytes"].astype(np.int64) for name in ("keys", "captions")}
        begins, at = {}, np.zeros(len(records), np.int64)
        for name, size in sizes.items():
            begins[name] = at
            at = at + -(-size // _ALIGNMENT) * _ALIGNMENT
        return begins | {"end": at}


@dataclass(frozen=True)
class Content:
    """What goes into a block.

    Attributes:
        keys: of each sample.
        captions: of all samples, one after the other; `caption_counts` says how many each has.
        captions_cut: how many are longer than the text length.
        text: int64 [captions, text length].
        codes: of each level, int64 [samples, crops, positions].
    """

    keys: list[str]
    captions: list[str]
    caption_counts: list[int]
    captions_cut: int
    text: NDArray[np.int64]
    codes: list[NDArray[np.int64]]


def token_dtype(vocabulary: int) -> DTypeLike:
    """The narrowest type for values in [0, vocabulary)."""
    return _dtype(vocabulary)


def _dtype(vocabulary: int) -> np.dtype[np.uint16] | np.dtype[np.uint32]:
    return np.dtype("<u2") if vocabulary <= 2**16 else np.dtype("<u4")


def pack(content: Content, shape: Shape, name: str) -> tuple[bytearray, Records]:
    """A block, and its record [1] without its place and hash; `name`: of the shard, for errors.

    Raises:
        UserError: a code is out of range.
    """
    keys = [key.encode() for key in content.keys]
    # A line break is white space like any other, which the text tokenizer makes a space.
    captions = [caption.replace("\n", " ").encode() for caption in content.captions]
    record = np.zeros(1, RECORD)
    sizes = {"key_bytes": sum(map(len, keys)), "caption_bytes": sum(map(len, captions))}
    for field, value in {"samples": len(keys), "captions": len(captions), **sizes}.items():
        if value >= _LARGEST:
            raise UserError(f"{name}: expected less than 2^32 {field}, found {value}: lower prepare.shard_size")
        record[field] = value
    record["captions_cut"] = content.captions_cut
    parts: dict[str, bytes] = {"text": _narrow(content.text, shape.text_vocab_size, name)}
    for number, (level, codes) in enumerate(zip(shape.levels, content.codes, strict=True)):
        parts[f"codes.{number}"] = _narrow(codes, level.codebook_size, name)
    if len(captions) != len(keys):
        parts["rows"] = _ends([0, *content.caption_counts])
    parts |= {"key_ends": _ends(list(map(len, keys))), "caption_ends": _ends(list(map(len, captions)))}
    return _laid_out(parts | {"keys": b"".join(keys), "captions": b"".join(captions)}, shape, record), record


def _laid_out(parts: Mapping[str, bytes], shape: Shape, record: Records) -> bytearray:
    begins = shape.sections(record)
    block = bytearray(int(begins["end"][0]))
    for section, content in parts.items():
        begin = int(begins[section][0])
        block[begin : begin + len(content)] = content
    record["bytes"] = len(block)
    return block


def _ends(sizes: list[int]) -> bytes:
    return np.cumsum(sizes, dtype=np.int64).astype("<u4").tobytes()


def _narrow(array: NDArray[np.int64], vocabulary: int, name: str) -> bytes:
    if array.size and not 0 <= int(array.min()) <= int(array.max()) < vocabulary:
        raise UserError(f"{name}: expected codes in [0, {vocabulary}), found {array.min()} to {array.max()}")
    return array.astype(token_dtype(vocabulary)).tobytes()


def section_of(block: bytes | memoryview, dtype: DTypeLike, shape: tuple[int, ...], begin: int) -> Array:
    """The array of this shape that begins there, without a copy."""
    array: Array = np.frombuffer(block, dtype, math.prod(shape), begin).reshape(shape)
    return array
