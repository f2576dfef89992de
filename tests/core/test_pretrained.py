"""Promises of a trained model's folder, whichever model it is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.core.errors import UserError
from pipeline.core.pretrained import count_parameters, load_model, save_model
from pipeline.training.sharded_state import TensorShard, write_shards


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
        write_shards(tmp_path / "checkpoint", "training", [TensorShard("a", 0, torch.zeros(3))])
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 3
    assert {path.stat().st_mode & 0o777 for path in files} == {0o644}


def test_a_damaged_header_is_one_line_wherever_parameters_are_counted(tmp_path: Path) -> None:
    save_model(nn.Linear(3, 2), {}, tmp_path)
    weights = tmp_path / "model.safetensors"
    assert count_parameters(weights) == 8
    weights.write_bytes(b"\xff" * 40)
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        count_parameters(weights)
