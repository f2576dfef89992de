"""Promises of a trained model's folder, whichever model it is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.config.transformer import TransformerShape
from pipeline.core.errors import UserError
from pipeline.core.pretrained import load_model, save_model
from pipeline.core.weights import count_parameters
from pipeline.image_tokenizer.base import ImageTokenizer, build
from pipeline.training.checkpoint_files import write_files
from pipeline.training.sharded_state import TensorShard, shards_file
from pipeline.transformer.layout import Layout
from pipeline.transformer.model import Transformer


def _network() -> nn.Module:
    network = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))  # the latter counts batches in whole numbers
    network.register_buffer("started", torch.tensor(True))
    return network


def _load(directory: Path) -> nn.Module:
    return load_model(directory, "some-stage", ("size",), lambda config, where: _network())


def test_weights_of_half_precision_are_written_in_float32_and_what_is_no_float_as_it_is(tmp_path: Path) -> None:
    network = _network().half()
    save_model(network, {"size": 1}, tmp_path)
    loaded = _load(tmp_path)
    assert not loaded.training
    for name, value in loaded.state_dict().items():
        expected = network.state_dict()[name]
        torch.testing.assert_close(value, expected.float() if expected.is_floating_point() else expected)


@pytest.mark.parametrize(("written", "found"), [('{"width": 3}', "found width"), ("[1]", "found list")])
def test_another_config_is_a_one_line_error(written: str, found: str, tmp_path: Path) -> None:
    save_model(_network(), {"size": 1}, tmp_path)
    (tmp_path / "config.json").write_text(written)
    with pytest.raises(UserError, match=f"expected the keys size, {found}; run the stage some-stage again"):
        _load(tmp_path)


def test_a_colleague_can_read_a_model_and_a_checkpoint_if_the_umask_lets(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        save_model(_network(), {"size": 1}, tmp_path / "model")
        (tmp_path / "checkpoint").mkdir()
        write_files(tmp_path / "checkpoint", dict([shards_file("training", [TensorShard("a", 0, torch.zeros(3))])]))
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 3
    assert {path.stat().st_mode & 0o777 for path in files} == {0o644}


def test_a_damaged_header_is_one_line_wherever_parameters_are_counted(tmp_path: Path) -> None:
    save_model(nn.Linear(3, 2), {}, tmp_path)
    weights = tmp_path / "model.safetensors"
    assert count_parameters(tmp_path) == 8
    weights.write_bytes(b"\xff" * 40)
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        count_parameters(tmp_path)


def test_loading_initialises_nothing_and_casts_while_it_reads(tmp_path: Path) -> None:
    layout, shape = Layout.of(4, 40, [(4, 4, 32)]), TransformerShape(layers=2, width=32, heads=2, base_width=16)
    model = Transformer(layout, shape)
    model.save_pretrained(tmp_path)
    before = torch.get_rng_state()
    with _BytesWritten() as written:
        loaded = Transformer.from_pretrained(tmp_path, torch.bfloat16)
    assert torch.equal(torch.get_rng_state(), before)  # no random number was drawn
    weights = sum(p.numel() for p in model.parameters())
    assert written.total == 2 * weights  # one copy, in bf16
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[name].bfloat16()), name
    assert not any(p.is_meta for p in loaded.parameters())


def test_constants_and_the_memory_format_of_a_model_survive_loading(tmp_path: Path) -> None:
    config = {"kind": "vqvae", "quantizer": {"kind": "lfq", "bits": 4}, "patch_size": 2, "widths": [8]}
    tokenizer = build(config, 8).eval()
    tokenizer.save_pretrained(tmp_path)
    loaded = ImageTokenizer.from_pretrained(tmp_path)
    assert [p.stride() for p in loaded.parameters()] == [p.stride() for p in tokenizer.parameters()]
    images = torch.rand(2, 3, 8, 8)
    assert torch.equal(loaded.encode(images)[0], tokenizer.encode(images)[0])


class _BytesWritten(TorchDispatchMode):
    """Counts the bytes that operations in place write into tensors of floats: memory that is not written costs none."""

    total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[object, ...] = (), kwargs: dict[str, object] | None = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        in_place = func._schema.name.endswith("_")
        if in_place and isinstance(result, torch.Tensor) and not result.is_meta and result.is_floating_point():
            self.total += result.nbytes
        return result
