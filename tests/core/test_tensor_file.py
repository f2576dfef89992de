"""Safetensors files, a tensor at a time."""

from __future__ import annotations

import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.core.errors import UserError
from pipeline.core.manifest import record
from pipeline.core.tensor_file import TensorFile, TensorLayout, write_tensors
from pipeline.core.weights import weight_files, write_weights

TENSORS = {
    "b.w": torch.randn(3, 5),
    "a": torch.arange(4),
    'ü"q': torch.tensor(3.0),
    "none": torch.zeros(0),
    "true": torch.tensor([True, False]),
    "turned": torch.randn(4, 2).t(),
    **{str(dtype): torch.ones(3, dtype=dtype) for dtype in (torch.bfloat16, torch.half, torch.double, torch.uint8)},
    **{str(dtype): torch.ones(2, dtype=dtype) for dtype in (torch.int8, torch.int16, torch.int32)},
}
LAYOUTS = {name: TensorLayout.of(tensor) for name, tensor in TENSORS.items()}


def test_a_file_has_the_bytes_that_safetensors_writes_and_the_hash_that_is_told(tmp_path: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in TENSORS.items()}, tmp_path / "theirs")
    told = write_tensors(tmp_path / "ours", LAYOUTS, TENSORS.__getitem__)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert told == record(tmp_path / "theirs")


def test_any_part_is_read_in_any_dtype(tmp_path: Path) -> None:
    write_tensors(tmp_path / "file", LAYOUTS, TENSORS.__getitem__)
    file = TensorFile(tmp_path / "file")
    assert file.layouts == LAYOUTS
    for dtype in (torch.float32, torch.float64):
        out = torch.zeros(9, dtype=dtype)
        file.read_into("b.w", 4, out[2:7])
        assert out[2:7].tolist() == TENSORS["b.w"].flatten()[4:9].tolist()
        assert not out[:2].any()


@pytest.mark.parametrize("damage", ["cut off", "no header", "short", "another format"])
def test_a_damaged_file_is_one_line(damage: str, tmp_path: Path) -> None:
    write_tensors(tmp_path / "file", LAYOUTS, TENSORS.__getitem__)
    whole = (tmp_path / "file").read_bytes()
    content = {"cut off": whole[:-1], "no header": b"\xff" * 40, "short": b"", "another format": b"\2\0\0\0\0\0\0\0[]"}
    (tmp_path / "file").write_bytes(content[damage])
    with pytest.raises(UserError, match="file is damaged: expected") as caught:
        TensorFile(tmp_path / "file").read_into("true", 0, torch.empty(2, dtype=torch.bool))
    assert "\n" not in str(caught.value)


def test_no_two_tensors_of_a_model_are_held_while_it_is_written(tmp_path: Path) -> None:
    memories: list[weakref.ref[NDArray[np.float32]]] = []

    def tensor_of(name: str) -> Tensor:
        assert not any(memory() is not None for memory in memories), name
        values = np.ones(1000, dtype=np.float32)
        memories.append(weakref.ref(values))
        return torch.from_numpy(values)

    layouts = {f"layer.{number}": TensorLayout(torch.float32, (1000,)) for number in range(10)}
    write_weights(tmp_path, layouts, tensor_of, shard_bytes=12_000)
    assert weight_files(tmp_path) == [f"model-0000{number}-of-00004.safetensors" for number in (1, 2, 3, 4)]


def test_weights_in_fewer_files_replace_those_of_before(tmp_path: Path) -> None:
    floats = {name: tensor for name, tensor in TENSORS.items() if tensor.dtype == torch.float32}
    layouts = {name: LAYOUTS[name] for name in floats}
    for shard_bytes in (20, 1_000_000, 60):
        write_weights(tmp_path, layouts, floats.__getitem__, shard_bytes)
        loaded = {name: t for file in weight_files(tmp_path) for name, t in load_file(tmp_path / file).items()}
        assert loaded.keys() == floats.keys()
        extra = {"model.safetensors.index.json"} if shard_bytes < 1000 else set()
        assert {path.name for path in tmp_path.iterdir()} == {*weight_files(tmp_path), *extra}


def test_an_index_that_leads_elsewhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../secret.safetensors"}}')
    with pytest.raises(UserError, match="is damaged"):
        weight_files(tmp_path)
