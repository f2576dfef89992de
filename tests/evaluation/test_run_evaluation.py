"""The metrics of a run: which of its images are compared, and what its reconstructions measure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from pipeline.config.evaluate import EvaluateConfig
from pipeline.core.atomic_io import write_json
from pipeline.core.image_size import PIXELS_AT_ONCE
from pipeline.data.catalog import Catalog
from pipeline.evaluation.examples import save_reconstructions
from pipeline.evaluation.feature_store import FeatureStore
from pipeline.evaluation.image_sets import images_at
from pipeline.evaluation.pair_metrics import measure_pairs, pair_metrics
from pipeline.evaluation.perturbed import perturbed_features
from pipeline.evaluation.run_evaluation import ImageSets, RealImages, tokenizer_rows
from pipeline.image_tokenizer.base import ImageTokenizer, build
from pipeline.metrics.psnr_ssim import psnr, ssim
from tests.data.sample_images import encoded, folder_config, image, write_folder
from tests.data.small_run import MODEL, make_small_run
from tests.evaluation.pixels import pixels
from tests.largest_tensor import LargestTensor

CONFIG = EvaluateConfig(bootstraps=0)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 60 images of noise and a white one, with an image tokenizer that makes white images of all."""
    directory = tmp_path_factory.mktemp("run")
    folder = write_folder(directory / "in", 60)
    (folder / "white.png").write_bytes(encoded(Image.new("RGB", (16, 16), "white")))
    (folder / "white.txt").write_text("a white image")
    config = folder_config(folder, shard_size=16, image_size=16, validation_fraction=0.3)
    make_small_run(directory, 61, None, prepare_config=config)
    model = directory / "image-tokenizer" / "model"
    tokenizer = ImageTokenizer.from_pretrained(model)
    with torch.no_grad():
        next(reversed(list(tokenizer.decoder.parameters()))).fill_(1e6)  # the bias of its last layer
    tokenizer.save_pretrained(model)
    return directory


def real_images(run: Path, config: EvaluateConfig, cache: Path) -> tuple[RealImages, FeatureStore]:
    store = FeatureStore(cache, pixels())
    return RealImages(ImageSets(run / "prepare", run / "generate", config, samples=0, seed=0), store), store


def test_an_image_that_comes_back_exactly_counts_as_100_db(run: Path, tmp_path: Path) -> None:
    real, store = real_images(run, CONFIG, tmp_path / "cache")
    tokenizer = ImageTokenizer.from_pretrained(run / "image-tokenizer" / "model")
    rows = [row for row in tokenizer_rows(tokenizer, real, store, CONFIG, seed=0) if row.metric == "PSNR (dB)"]
    assert [row.compares.split()[0] for row in rows] == ["validation", "training"]
    assert all(row.value is not None and 0 < row.value < 100 for row in rows)
    assert all(row.interval for row in rows)
    every = CONFIG.model_copy(update={"reconstructions_shown": 61})
    entries = save_reconstructions(tokenizer, real, tmp_path, every, seed=0)
    assert {entry["psnr"] for entry in entries if entry["key"] == "white"} == {100.0}
    write_json(tmp_path / "metrics.json", {"rows": [row.as_json() for row in rows], "reconstructions": entries})
    json.loads((tmp_path / "metrics.json").read_text(), parse_constant=pytest.fail)  # Infinity is no JSON


def test_large_images_are_rebuilt_and_measured_a_few_at_a_time(tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / f"{number}.png").write_bytes(encoded(image(number, (256, 256))))
    images, tokenizer = images_at(tmp_path), build(MODEL, 256)
    with LargestTensor() as largest:
        measured, _ = measure_pairs(tokenizer, images, pair_metrics(CONFIG, torch.device("cpu")), pixels(), 4)
        perturbed_features(tokenizer, images, (0.5, 4), pixels(), 4, seed=0)
    assert largest.elements <= 3 * PIXELS_AT_ONCE < 20 * 3 * 256**2
    assert [len(values) for values in measured if isinstance(values, torch.Tensor)] == [20, 20]


def test_many_large_pairs_measure_what_each_does_alone() -> None:
    x, y = torch.rand(20, 3, 256, 256), torch.rand(20, 3, 256, 256)
    with LargestTensor() as largest:
        together = psnr(x, y), ssim(x, y)
    assert largest.elements <= 3 * PIXELS_AT_ONCE
    alone = [torch.cat([measure(x[i : i + 1], y[i : i + 1]) for i in range(20)]) for measure in (psnr, ssim)]
    assert all(torch.equal(many, each) for many, each in zip(together, alone, strict=True))


def test_fewer_images_than_a_run_has_are_drawn_from_all_of_them(run: Path, tmp_path: Path) -> None:
    whole, _ = real_images(run, CONFIG, tmp_path / "whole")
    train, held_out = ([image.key for image in images] for images in (whole.samples, whole.validation))
    assert (len(train), len(held_out)) == (42, 19)
    assert train == Catalog(run / "prepare", "train").keys(range(42))  # all of them, in their order

    few = CONFIG.model_copy(update={"training_images": 12, "reconstructions": 6})
    real, store = real_images(run, few, tmp_path / "few")
    tokenizer_rows(ImageTokenizer.from_pretrained(run / "image-tokenizer" / "model"), real, store, few, seed=0)
    sets = {tuple(path.read_text().split()) for path in (tmp_path / "few").glob("*/keys.txt")}
    of_train, of_held_out = ({keys for keys in sets if set(keys) <= set(split)} for split in (train, held_out))
    assert sorted(map(len, of_train)) == [6, 12]
    assert sorted(map(len, of_held_out)) == [6]
    for keys, split in [(keys, train) for keys in of_train] + [(keys, held_out) for keys in of_held_out]:
        rows = [split.index(key) for key in keys]
        assert rows == sorted(rows)
        assert max(rows) >= len(split) // 2  # no first rows

    other = ImageSets(run / "prepare", run / "generate", few, samples=0, seed=1)
    assert {image.key for image in other.training} != {image.key for image in real.samples}
