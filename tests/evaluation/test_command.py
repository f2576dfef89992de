"""`smalti evaluate --real A --fake B` through the real command line; features on disk, shared and resumed."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.config.evaluate import EvaluateConfig
from pipeline.core.errors import UserError
from pipeline.data.shards import Sample, write_shard
from pipeline.evaluation import feature_store
from pipeline.evaluation.comparison import compare_features
from pipeline.evaluation.feature_store import FeatureStore, check_same_extractor, read_features, save_features
from pipeline.evaluation.image_sets import StoredImage, images_at
from pipeline.evaluation.reference_stats import reference_gaussian
from pipeline.extractors.base import Extractor
from pipeline.extractors.registry import load_extractor
from pipeline.metrics import frechet
from pipeline.metrics.frechet import frechet_distance
from tests.launch import launch


def generated(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same 24 images as a folder and as a tar; and 20 others, with captions."""
    root = tmp_path_factory.mktemp("sets")
    (root / "real").mkdir()
    (root / "fake").mkdir()
    for i in range(24):
        generated(i).save(root / "real" / f"{i:03d}.png")
    for i in range(20):
        generated(100 + i).save(root / "fake" / f"{i:03d}.png")
        (root / "fake" / f"{i:03d}.txt").write_text(f"image {i}\n")
    samples = [Sample(f"{i:03d}", (root / "real" / f"{i:03d}.png").read_bytes(), f"image {i}", {}) for i in range(24)]
    write_shard(root / "real.tar", samples)
    return root


@pytest.fixture(scope="module")
def extractor() -> Extractor:
    return load_extractor("efficientnet-lite0", torch.device("cpu"), batch_size=8)


def rows(path: Path) -> dict[str, Any]:
    return {row["metric"]: row for row in json.loads(path.read_text())["rows"]}


@pytest.mark.slow
def test_folder_against_folder_then_feature_files(sets: Path, tmp_path: Path) -> None:
    cache = f"--cache={tmp_path / 'cache'}"
    saved = [f"--save-real={tmp_path / 'real.npz'}", f"--save-fake={tmp_path / 'fake.npz'}"]
    arguments = ("evaluate", "--real", str(sets / "real"), "--fake", str(sets / "fake"), cache, *saved)
    output = launch("pipeline", *arguments, "-o", str(tmp_path / "folders.json"))
    assert "FD (Lite0)" in output
    assert "efficientnet-lite0, weights" in output
    assert "20 real and 20 fake images" in output
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


@pytest.mark.slow
def test_two_ranks_share_the_features(sets: Path, tmp_path: Path) -> None:
    for processes in (1, 2):
        launch(
            *("pipeline", "evaluate", "--real", str(sets / "real"), "--fake", str(sets / "fake")),
            *("--cache", str(tmp_path / f"cache{processes}"), "-o", str(tmp_path / f"{processes}.json")),
            processes=processes,
        )
    one, two = rows(tmp_path / "1.json"), rows(tmp_path / "2.json")
    assert {name: row["value"] for name, row in one.items()} == {name: row["value"] for name, row in two.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--real", "nowhere", "--fake", "nowhere"], "nowhere: expected a folder of images"),
        (["--real", "nowhere"], "expected two sets of images"),
        (["seed=1"], "expected two sets of images"),
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


def test_tar_and_folder_of_the_same_images_share_a_cache_entry(
    sets: Path, tmp_path: Path, extractor: Extractor
) -> None:
    store = FeatureStore(tmp_path, extractor)
    from_folder, from_tar = images_at(sets / "real"), images_at(sets / "real.tar")
    assert [p.key for p in from_folder] == [p.key for p in from_tar]
    assert from_tar[3].caption == "image 3"
    store.features(from_folder)
    assert store.directory(from_folder) == store.directory(from_tar)
    (sets / "changed").mkdir()
    for i, image in enumerate(from_folder):
        content = from_folder[0].content() if i == 5 else image.content()
        (sets / "changed" / f"{image.key}.png").write_bytes(content)
    assert store.directory(images_at(sets / "changed")) != store.directory(from_folder)


def test_killed_extraction_resumes(
    sets: Path, tmp_path: Path, extractor: Extractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_store, "PART", 10)
    images = images_at(sets / "real")
    whole = FeatureStore(tmp_path / "whole", extractor).features(images)
    store = FeatureStore(tmp_path / "shared", extractor)
    folder = store.extract(images, which=1, of=2)
    assert [path.name for path in folder.iterdir()] == ["part-00001.npz"]  # images 10 to 19
    read: list[str] = []
    monkeypatch.setattr(StoredImage, "image", property(lambda self: read.append(self.key) or generated(int(self.key))))
    shared = store.features(images)
    assert read == [f"{i:03d}" for i in (*range(10), *range(20, 24))]
    assert torch.equal(shared.features, whole.features)
    assert shared.logits is not None
    assert shared.logits.shape == (24, 1000)
    assert sorted(path.name for path in folder.iterdir()) == ["about.json", "features.npy", "keys.txt", "logits.npy"]
    store.features(images)
    assert len(read) == 14


def test_features_of_another_extractor_are_refused(sets: Path, tmp_path: Path, extractor: Extractor) -> None:
    ours = extractor([generated(1), generated(2)])
    np.savez(tmp_path / "other.npz", features=np.zeros((3, 1280), np.float32), name="my network")
    with pytest.raises(UserError, match="expected one name, found 'efficientnet-lite0' .real. and 'my network'"):
        check_same_extractor(ours, read_features(tmp_path / "other.npz"))
    save_features(ours, tmp_path / "ours.npz")
    check_same_extractor(ours, read_features(tmp_path / "ours.npz"))


@pytest.mark.slow
def test_mixed_sizes_are_told(sets: Path, tmp_path: Path) -> None:
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for i in range(6):
        generated(i).resize((12 + 4 * (i % 2), 12)).save(mixed / f"{i}.png")
    arguments = ("pipeline", "evaluate", "--fake", str(mixed), "--cache", str(tmp_path / "cache"))
    output = launch(*arguments, "--real", str(sets / "real"))
    assert "warning: fake images: expected one size, found 2 (3 of 12 × 12, 3 of 16 × 12)" in output
    assert "real images: expected" not in output
    assert "have the bytes of another one" not in output


@pytest.mark.slow
def test_an_image_under_two_names_is_told(sets: Path, tmp_path: Path) -> None:
    fake = tmp_path / "fake"
    fake.mkdir()
    for i in range(6):
        generated(i).save(fake / f"{i}.png")
    (fake / "copy.png").write_bytes((fake / "2.png").read_bytes())
    output = launch(
        "pipeline", "evaluate", "--real", str(sets / "real"), "--fake", str(fake), "--cache", str(tmp_path / "cache")
    )
    copied = "1 of 7 have the bytes of another one, and count again (the first: copy.png, the same as 2.png)"
    assert f"warning: fake images: {copied}" in output


@pytest.mark.slow
def test_features_that_are_nan_are_an_error(tmp_path: Path) -> None:
    features = np.ones((9, 8), np.float32)
    np.savez(tmp_path / "real.npz", features=features)
    features[3] = np.nan
    np.savez(tmp_path / "fake.npz", features=features)
    files = ("--real", str(tmp_path / "real.npz"), "--fake", str(tmp_path / "fake.npz"))
    output = launch("pipeline", "evaluate", *files, check=False)
    assert (
        "generated: expected finite numbers, found NaN or infinity in 1 of 9 samples (the first is sample 3)" in output
    )
    assert "Traceback" not in output


def test_empty_feature_file_is_named(extractor: Extractor) -> None:
    some = extractor([generated(1), generated(2)])
    with pytest.raises(UserError, match=r"generated: expected at least 2 samples \(a covariance\), found 0"):
        compare_features(some, some.take(slice(0)), EvaluateConfig(), seed=0)


def test_statistics_of_a_reference_set_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    generated = torch.randn(30, 8, generator=torch.Generator().manual_seed(1))
    plain = frechet_distance(real, generated)
    made = reference_gaussian(real, tmp_path)
    (kept,) = (tmp_path / "statistics").iterdir()
    monkeypatch.setattr(frechet, "moments", None)  # whoever sums up again, fails
    read = reference_gaussian(real.clone(), tmp_path)
    monkeypatch.undo()
    assert read.distance(made) == made.distance(read) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(real, generated, read) == plain
    kept.write_bytes(kept.read_bytes()[:100])
    assert frechet_distance(real, generated, reference_gaussian(real, tmp_path)) == plain
    reference_gaussian(real + 1, tmp_path)
    assert len(list((tmp_path / "statistics").iterdir())) == 2


def test_cache_keeps_within_its_bound(sets: Path, tmp_path: Path, extractor: Extractor) -> None:
    store = FeatureStore(tmp_path, extractor)
    images = images_at(sets / "real")
    for n in (2, 3, 4):
        store.features(images[:n])
    folders = [store.directory(images[:n]) for n in (2, 3, 4)]
    feature_store.trim(tmp_path, limit_gb=0)
    assert all(folder.is_dir() for folder in folders)  # used a moment ago
    now = time.time()
    for hours, folder in ((30, folders[0]), (20, folders[1]), (10, folders[2])):
        for file in folder.iterdir():
            os.utime(file, (now - 3600 * hours, now - 3600 * hours))
    store.extract(images[:2])  # the oldest one is used again
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("not ours")
    os.utime(tmp_path / "thesis" / "chapter.txt", (0, 0))
    size = sum(file.stat().st_size for folder in folders for file in folder.iterdir())
    feature_store.trim(tmp_path, limit_gb=(size - 1) / 1e9)
    assert [folder.is_dir() for folder in folders] == [True, False, True]
    assert (tmp_path / "thesis" / "chapter.txt").exists()


def test_what_is_no_feature_file_is_said(tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", x=np.zeros((3, 8)))
    (tmp_path / "damaged.npz").write_bytes(b"PK\x03\x04 no zip")
    for name in ("other.npz", "damaged.npz"):
        with pytest.raises(UserError, match=f"{name}: expected a feature file with an array `features`"):
            read_features(tmp_path / name)
    np.savez(tmp_path / "rows.npz", features=np.zeros((3, 8)), logits=np.zeros((2, 8)))
    with pytest.raises(UserError, match="expected 3 rows of features"):
        read_features(tmp_path / "rows.npz")
