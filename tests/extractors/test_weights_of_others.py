"""Weights and features that somebody else made: read without running code of theirs, and refused in one line."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Dinov2Config, Dinov2Model

from pipeline.config.image_losses import PerceptualConfig
from pipeline.core.errors import UserError
from pipeline.evaluation.feature_store import read_features
from pipeline.extractors.lpips_vgg16 import Lpips
from pipeline.extractors.registry import load_extractor
from pipeline.image_tokenizer.perceptual import Perceptual

CPU = torch.device("cpu")


class Touch:
    """Unpickled with code allowed, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    return tmp_path / "ran"


def evil(path: Path, ran: Path) -> Path:
    """A checkpoint of torch that would make the file `ran`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"features.0.weight": Touch(ran)}, path)
    return path


def dinov2(folder: Path) -> Path:
    Dinov2Model(
        Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    ).save_pretrained(folder)
    processor = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "crop_size": {"height": 28, "width": 28}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def test_the_trap_works(tmp_path: Path, ran: Path) -> None:
    torch.load(evil(tmp_path / "evil.pth", ran), weights_only=False)
    assert ran.exists()


def test_inception_and_lpips_run_no_pickle(tmp_path: Path, ran: Path) -> None:
    weights = evil(tmp_path / "evil.pth", ran)
    with pytest.raises(UserError, match=r"evil.pth: expected the state dict"):
        load_extractor("inception-v3", CPU, weights=str(weights))
    evil(tmp_path / "lpips" / "vgg16-397923af.pth", ran)
    evil(tmp_path / "lpips" / "vgg.pth", ran)
    with pytest.raises(UserError, match=r"evaluate.lpips: the files in .* are not those of VGG-16"):
        Lpips.from_folder(tmp_path / "lpips", "evaluate.lpips")
    (tmp_path / "lpips" / "vgg16-397923af.pth").write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"evaluate.lpips: the files in .* are not those of VGG-16"):
        Lpips.from_folder(tmp_path / "lpips", "evaluate.lpips")
    assert not ran.exists()


@pytest.mark.slow
def test_a_folder_of_transformers_runs_no_pickle_and_no_code(tmp_path: Path, ran: Path) -> None:
    folder = dinov2(tmp_path / "dinov2")
    shutil.copytree(folder, tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    evil(tmp_path / "pickled" / "pytorch_model.bin", ran)
    with pytest.raises(UserError, match="the model in .*pickled cannot be read"):
        load_extractor("dinov2", CPU, weights=str(tmp_path / "pickled"))
    config = json.loads((folder / "config.json").read_text())
    coded = tmp_path / "coded"
    shutil.copytree(folder, coded)
    (coded / "evil.py").write_text(f"import pathlib\npathlib.Path({str(ran)!r}).touch()\n")
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}}
    (coded / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="expected a model of type dinov2 in .*, found evil"):
        load_extractor("dinov2", CPU, weights=str(coded))
    with pytest.raises(UserError, match="perceptual.weights: expected a backbone"):  # and asks nobody
        Perceptual(
            PerceptualConfig.model_validate({"backbone": "transformers", "weights": str(coded), "weight": 1}), 32
        )
    assert not ran.exists()


def test_damaged_folders_of_transformers_are_told_in_one_line(tmp_path: Path) -> None:
    for name, file, content in (
        ("weights", "model.safetensors", b"no weights"),
        ("list", "config.json", b"[]"),
        ("processor", "preprocessor_config.json", b"{}"),
    ):
        folder = dinov2(tmp_path / name)
        (folder / file).write_bytes(content)
        with pytest.raises(UserError):
            load_extractor("dinov2", CPU, weights=str(folder))


def test_a_feature_file_runs_no_pickle(tmp_path: Path, ran: Path) -> None:
    np.savez(tmp_path / "evil.npz", features=np.array([[Touch(ran)]], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="evil.npz: expected a feature file"):
        read_features(tmp_path / "evil.npz")
    folder = tmp_path / "stored"
    folder.mkdir()
    (folder / "about.json").write_text("[]")
    with pytest.raises(UserError, match="stored: expected a feature file"):
        read_features(folder)
    (folder / "about.json").write_text("{}")
    (folder / "features.npy").write_bytes(pickle.dumps(Touch(ran)))
    with pytest.raises(UserError, match="stored: expected a feature file"):
        read_features(folder)
    assert not ran.exists()
