"""`smalti evaluate --real A --fake B` through the real command line; features on disk, shared and gone on with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.data.shards import Sample, write_shard
from pipeline.errors import UserError
from pipeline.metrics import feature_store
from pipeline.metrics.feature_store import FeatureStore, check_same_extractor, read_features, save_features
from pipeline.metrics.features import Extractor, load_extractor
from pipeline.metrics.pictures import Picture, pictures_at
from tests.launch import launch


def painted(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same 24 pictures as a folder and as a tar; and 20 others, with captions."""
    root = tmp_path_factory.mktemp("sets")
    (root / "real").mkdir()
    (root / "fake").mkdir()
    for i in range(24):
        painted(i).save(root / "real" / f"{i:03d}.png")
    for i in range(20):
        painted(100 + i).save(root / "fake" / f"{i:03d}.png")
        (root / "fake" / f"{i:03d}.txt").write_text(f"picture {i}\n")
    samples = [Sample(f"{i:03d}", (root / "real" / f"{i:03d}.png").read_bytes(), f"picture {i}", {}) for i in range(24)]
    write_shard(root / "real.tar", samples)
    return root


@pytest.fixture(scope="module")
def extractor() -> Extractor:
    return load_extractor("efficientnet-lite0", torch.device("cpu"), batch_size=8)


def rows(path: Path) -> dict[str, Any]:
    return {row["metric"]: row for row in json.loads(path.read_text())["rows"]}


def test_folder_against_folder_then_feature_files(sets: Path, tmp_path: Path) -> None:
    cache = f"--cache={tmp_path / 'cache'}"
    saved = [f"--save-real={tmp_path / 'real.npz'}", f"--save-fake={tmp_path / 'fake.npz'}"]
    arguments = ("evaluate", "--real", str(sets / "real"), "--fake", str(sets / "fake"), cache, *saved)
    output = launch("pipeline", *arguments, "-o", str(tmp_path / "folders.json"))
    assert "FD (Lite0)" in output
    assert "efficientnet-lite0, weights" in output
    assert "20 samples for 1280 feature dimensions" in output
    measured = rows(tmp_path / "folders.json")
    assert measured["FD (Lite0)"]["n_real"] == measured["FD (Lite0)"]["n_generated"] == 20
    low, high = measured["FD (Lite0)"]["interval"]
    assert low <= measured["FD (Lite0)"]["value"] <= high
    assert "CLIP" not in output
    launch(
        *("pipeline", "evaluate", "--real", str(tmp_path / "real.npz"), "--fake", str(tmp_path / "fake.npz")),
        *("-o", str(tmp_path / "files.json")),
    )
    again = rows(tmp_path / "files.json")
    assert {name: row["value"] for name, row in again.items()} == {n: row["value"] for n, row in measured.items()}


def test_two_ranks_share_the_features(sets: Path, tmp_path: Path) -> None:
    for processes in (1, 2):
        launch(
            *("pipeline", "evaluate", "--real", str(sets / "real"), "--fake", str(sets / "fake")),
            *("--cache", str(tmp_path / f"cache{processes}"), "-o", str(tmp_path / f"{processes}.json")),
            processes=processes,
        )
    one, two = rows(tmp_path / "1.json"), rows(tmp_path / "2.json")
    assert {name: row["value"] for name, row in one.items()} == {name: row["value"] for name, row in two.items()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--real", "nowhere", "--fake", "nowhere"], "nowhere: expected a folder of pictures"),
        (["--real", "nowhere"], "expected two sets of pictures"),
        (["seed=1"], "expected two sets of pictures"),
        (["--real", "{real}", "--fake", "{real}", "--extractor", "clip"], "clip needs evaluate.weights"),
        (
            ["--real", "{real}", "--fake", "{real}", "--extractor", "inception-v3", "--weights", "{real}/no.pth"],
            "pt_inception-2015-12-05-6726825d.pth",
        ),
    ],
)
def test_mistakes_are_told_in_one_line(sets: Path, arguments: list[str], message: str) -> None:
    filled = [argument.format(real=sets / "real") for argument in arguments]
    output = launch("pipeline", "evaluate", *filled, check=False)
    assert message in output
    assert "Traceback" not in output


def test_tar_and_folder_of_the_same_pictures_share_a_cache_entry(
    sets: Path, tmp_path: Path, extractor: Extractor
) -> None:
    store = FeatureStore(tmp_path, extractor)
    from_folder, from_tar = pictures_at(sets / "real"), pictures_at(sets / "real.tar")
    assert [p.key for p in from_folder] == [p.key for p in from_tar]
    assert from_tar[3].caption == "picture 3"
    store.features(from_folder)
    assert store.place(from_folder) == store.place(from_tar)
    (sets / "changed").mkdir()
    for i, picture in enumerate(from_folder):
        content = from_folder[0].content() if i == 5 else picture.content()
        (sets / "changed" / f"{picture.key}.png").write_bytes(content)
    assert store.place(pictures_at(sets / "changed")) != store.place(from_folder)


def test_killed_extraction_goes_on(
    sets: Path, tmp_path: Path, extractor: Extractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_store, "PART", 10)
    pictures = pictures_at(sets / "real")
    whole = FeatureStore(tmp_path / "whole", extractor).features(pictures)
    store = FeatureStore(tmp_path / "shared", extractor)
    place = store.extract(pictures, which=1, of=2)
    assert [path.name for path in place.iterdir()] == ["part-00001.npz"]  # pictures 10 to 19
    read: list[str] = []
    monkeypatch.setattr(Picture, "image", property(lambda self: read.append(self.key) or painted(int(self.key))))
    shared = store.features(pictures)
    assert read == [f"{i:03d}" for i in (*range(10), *range(20, 24))]
    assert torch.equal(shared.features, whole.features)
    assert shared.logits is not None
    assert shared.logits.shape == (24, 1000)
    assert sorted(path.name for path in place.iterdir()) == ["about.json", "features.npy", "keys.txt", "logits.npy"]
    store.features(pictures)
    assert len(read) == 14


def test_features_of_another_extractor_are_refused(sets: Path, tmp_path: Path, extractor: Extractor) -> None:
    ours = extractor([painted(1), painted(2)])
    np.savez(tmp_path / "other.npz", features=np.zeros((3, 1280), np.float32), name="my network")
    with pytest.raises(UserError, match="expected one name, found 'efficientnet-lite0' .real. and 'my network'"):
        check_same_extractor(ours, read_features(tmp_path / "other.npz"))
    save_features(ours, tmp_path / "ours.npz")
    check_same_extractor(ours, read_features(tmp_path / "ours.npz"))


def test_what_is_no_feature_file_is_said(tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", x=np.zeros((3, 8)))
    (tmp_path / "damaged.npz").write_bytes(b"PK\x03\x04 no zip")
    for name in ("other.npz", "damaged.npz"):
        with pytest.raises(UserError, match=f"{name}: expected a feature file with an array `features`"):
            read_features(tmp_path / name)
    np.savez(tmp_path / "rows.npz", features=np.zeros((3, 8)), logits=np.zeros((2, 8)))
    with pytest.raises(UserError, match="expected 3 rows of features"):
        read_features(tmp_path / "rows.npz")
